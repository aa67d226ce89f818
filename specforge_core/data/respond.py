"""Conversations being answered turn by turn, whichever engine runs the target."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..draws import later_seed
from ..errors import CaptureError, DataError
from ..target.asked import max_positions
from ..target.tokenizer import template_options
from ..types import Generated, GenerateOptions, Prompt, TargetInfo
from .chat import Encoder
from .ends import end_tokens
from .harmony import as_message
from .messages import OnlyRead
from .rows import offering
from .sources import BadRow, Conversation, Message
from .tokenrows import add_turn
from .tools import Tool
from .usable import TOO_LONG as TOO_LONG, UNFINISHED, bound_of, check_ids

BATCHES = 16  # asked for together: a conversation is in the file once its own turns are answered
RETOKENIZED = 4  # tokens that a text may have for each that was generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One conversation to answer."""

    id: str
    where: str
    place: int  # among all tasks, done or not: with the turn and the seed it decides the draws
    turns: tuple[tuple[Message, ...], ...]  # each ends in a user's message, or a tool's
    metadata: Mapping[str, Any]
    length: int  # of the first prompt, in tokens
    tools: tuple[Tool, ...] = ()  # that the target may call


def asked_turns(found: Conversation) -> tuple[tuple[Message, ...], ...]:
    """Return what is asked turn by turn, without the answers: the target writes its own.

    Where tools are called, their results follow from the calls that stand there.  So these are
    read as they are, and the one answer behind the last message of a user or a tool is written.
    """
    messages = found.messages
    if found.tools or any(message["role"] == "tool" for message in messages):
        last = max(n for n, message in enumerate(messages) if message["role"] in ("user", "tool"))
        return (
            tuple(
                OnlyRead(message) if message["role"] == "assistant" else message
                for message in messages[: last + 1]
            ),
        )
    turns: list[tuple[Message, ...]] = []
    asked: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            asked.append(message)
        if message["role"] == "user":
            turns.append(tuple(asked))
            asked = []
    return tuple(turns)


@dataclass(slots=True)
class Chat:
    """A conversation while it is being answered."""

    task: Task
    messages: list[Message] = field(default_factory=list)  # up to the last answer kept
    dropped: str | None = None  # why the next answer is not kept
    answered: int = 0  # turns
    token_rows: list[dict[str, list[int]]] = field(default_factory=list)  # of all read and written
    finish_reasons: list[str] = field(default_factory=list)  # of each answer
    retokenized: bool = False  # tokens of an answer were made of its text

    @property
    def finished(self) -> bool:
        return self.dropped is not None or self.answered == len(self.task.turns)

    def asked(self) -> list[Message]:
        """Return what the next answer follows."""
        return [*self.messages, *self.task.turns[self.answered]]


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be asked of one target, and which of its answers are kept."""

    run: RunConfig
    encoder: Encoder
    limit: int  # a prompt has fewer tokens
    info: TargetInfo

    @classmethod
    def of(cls, run: RunConfig, tokenizer: PreTrainedTokenizerBase, info: TargetInfo) -> Rules:
        kwargs = template_options(run.data)
        limit = min(run.data.max_length, max_positions(info) or run.data.max_length)
        ends = end_tokens(info, tokenizer, kwargs)
        return cls(run, Encoder(tokenizer, kwargs, limit, ends), limit, info)

    def prompt(self, chat: Chat) -> Prompt | None:
        """Tokenize what the target reads next; None, and the reason noted, where it cannot."""
        data = self.run.data
        try:
            ids = offering(self.encoder, chat.task.tools).prompt(chat.asked())
        except BadRow as exc:
            if data.on_error == "raise":
                raise exc.at(chat.task.where) from exc
            chat.dropped = exc.reason
            return None
        check_ids(ids, self.info.vocab_size, chat.task.where)
        if len(ids) < self.limit:
            tokens = torch.tensor(ids)
            return Prompt(
                index=chat.task.place, input_ids=tokens, loss_mask=torch.zeros_like(tokens)
            )
        if data.too_long == "raise":
            raise DataError(
                f"{chat.task.where}: a prompt of {len(ids)} tokens leaves no room for an answer "
                f"within {bound_of(data, self.limit)}. Try: data.max_length={2 * len(ids)}, "
                "or data.too_long=skip"
            )
        chat.dropped = TOO_LONG
        return None

    def keep(self, chat: Chat, prompt: Prompt, answer: Generated) -> None:
        """Add an answer to the conversation, or note why it ends before it."""
        if answer.refused is not None:
            if self.run.data.on_error == "raise":
                raise DataError(
                    f"{chat.task.where}: target.engine={self.run.target.engine} refuses the prompt "
                    f"of {len(prompt.input_ids)} tokens ({answer.refused}). Shorten it "
                    "(data.max_length), or set data.on_error=skip"
                )
            chat.dropped = "refused by the engine"
            return
        self._check(chat, answer)
        tokens = answer.tokens
        if tokens and answer.finished and tokens[-1] in self.encoder.ends:
            tokens = tokens[:-1]
        text = str(self.encoder.tokenizer.decode(list(tokens)))
        if not answer.finished and not self.run.regenerate.keep_unfinished:
            chat.dropped = UNFINISHED
        elif not text.strip():
            chat.dropped = "empty"
        else:
            chat.messages = [*chat.asked(), as_message(text)]
            chat.answered += 1
            chat.finish_reasons.append("stop" if answer.finished else "length")
            chat.retokenized |= answer.retokenized
            add_turn(chat.token_rows, prompt.input_ids.tolist(), answer.tokens)

    def _check(self, chat: Chat, answer: Generated) -> None:
        """Raise CaptureError for tokens that were not asked for, or that there are not."""
        engine, asked = self.run.target.engine, self.run.regenerate.max_new_tokens
        most = asked + 1  # the end may come behind them
        if len(answer.tokens) > (RETOKENIZED * most if answer.retokenized else most):
            raise CaptureError(
                f"{chat.task.where}: target.engine={engine} answered with {len(answer.tokens):,} "
                f"tokens, and was asked for {asked} at most. What answers passes over max_tokens"
            )
        if not all(0 <= token < self.info.vocab_size for token in answer.tokens):
            raise CaptureError(
                f"{chat.task.where}: target.engine={engine} answered with tokens beyond the "
                f"target's vocabulary of {self.info.vocab_size}. Does it run "
                f"{self.info.name_or_path}?"
            )


class Generates(Protocol):
    """The part of a target engine that answers."""

    @property
    def info(self) -> TargetInfo: ...
    def generate(
        self, prompts: Sequence[Prompt], options: GenerateOptions, /
    ) -> Iterator[Generated]: ...


class Answerer:
    """Asks a target engine for the answers, one turn of many conversations at a time."""

    def __init__(
        self, run: RunConfig, tokenizer: PreTrainedTokenizerBase, engine: Generates
    ) -> None:
        self._settings, self._engine = run.regenerate, engine
        self._rules = Rules.of(run, tokenizer, engine.info)
        self._started: float | None = None
        self.num_tokens = 0  # in the answers so far

    @property
    def seconds(self) -> float:
        """Since the first question."""
        return time.perf_counter() - self._started if self._started is not None else 0.0

    def answer(self, tasks: Sequence[Task]) -> Generator[Chat]:
        """Yield each conversation as soon as it is finished, those with long prompts first.

        What does not fit in memory shows early then, and prompts of like lengths are asked
        together.  A conversation is finished by its last answer, or the first that is not kept.
        """
        ordered = sorted(tasks, key=lambda task: -task.length)
        size = BATCHES * self._settings.batch_size
        for start in range(0, len(ordered), size):
            going = [Chat(task) for task in ordered[start : start + size]]
            turn = 0
            while going:
                left = []
                for chat in self._turn(going, turn):
                    if chat.finished:
                        yield chat
                    else:
                        left.append(chat)
                going, turn = left, turn + 1

    def _turn(self, chats: Sequence[Chat], turn: int) -> Iterator[Chat]:
        """Answer one turn of each; yield all, in the order in which they come back."""
        asked: dict[int, tuple[Chat, Prompt]] = {}
        for chat in chats:
            prompt = self._rules.prompt(chat)
            if prompt is None:
                yield chat
            else:
                asked[prompt.index] = chat, prompt
        if not asked:
            return
        self._started = self._started or time.perf_counter()
        prompts = [prompt for _, prompt in asked.values()]
        for answer in self._engine.generate(prompts, self._options(turn)):
            found = asked.pop(answer.index, None)
            if found is None:
                raise CaptureError(
                    f"the target engine answered prompt {answer.index}, which it was not asked, or "
                    "twice. Try: target.engine=transformers"
                )
            self.num_tokens += len(answer.tokens)
            self._rules.keep(*found, answer)
            yield found[0]
        if asked:
            where = next(iter(asked.values()))[0].task.where
            raise CaptureError(
                f"the target engine did not answer {where} and {len(asked) - 1} more. "
                "Try: target.engine=transformers"
            )

    def _options(self, turn: int) -> GenerateOptions:
        settings = self._settings
        return GenerateOptions(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=later_seed(settings.seed, turn),
            eos=self._rules.encoder.ends,
            batch_size=settings.batch_size,
        )
