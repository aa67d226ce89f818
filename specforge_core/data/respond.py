"""A conversation being answered turn by turn, whoever writes the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..errors import DataError
from .chat import encode_prompt
from .prompts import check_ids
from .sources import Message


@dataclass(frozen=True, slots=True)
class Task:
    """One conversation to answer."""

    id: str
    where: str
    turns: tuple[tuple[Message, ...], ...]  # each ends in a user's message
    metadata: Mapping[str, Any]
    length: int  # of the first prompt, in tokens


@dataclass(slots=True)
class Chat:
    """A conversation while it is being answered."""

    task: Task
    messages: list[Message] = field(default_factory=list)  # up to the last answer kept
    dropped: str | None = None  # why the next answer is not kept


class Answerer(Protocol):
    """What writes the answers: the target in this process, or servers."""

    @property
    def num_tokens(self) -> int: ...  # in the answers so far
    @property
    def seconds(self) -> float: ...  # spent on them

    def answer(self, tasks: Sequence[Task], done: Set[str]) -> Iterator[list[Chat]]:
        """Yield chats as they are finished, some at a time; those in `done` may be among them."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be asked of one target, and which of its answers are kept."""

    run: RunConfig
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    positions: int | None  # prompt and answer together

    def prompt(self, chat: Chat, messages: Sequence[Message]) -> list[int] | None:
        """Tokenize what the target reads next; None, and the reason noted, where it cannot."""
        data = self.run.data
        limit = min(data.max_length, self.positions or data.max_length)
        try:
            ids = encode_prompt(self.tokenizer, messages, data.chat_template_kwargs)
        except DataError as exc:
            if data.on_error == "raise":
                raise DataError(f"{chat.task.where}: {exc}") from exc
            chat.dropped = "refused by the chat template"
            return None
        check_ids(ids, self.vocab_size, chat.task.where)
        if len(ids) < limit:
            return ids
        if data.too_long == "raise":
            raise DataError(
                f"{chat.task.where}: a prompt of {len(ids)} tokens leaves no room for an answer "
                f"within {limit}. Try: data.max_length={2 * len(ids)}, or data.too_long=skip"
            )
        chat.dropped = "too long"
        return None

    def room(self, length: int) -> int:
        """Return how many tokens may be written after a prompt of `length` tokens."""
        most = self.run.regenerate.max_new_tokens
        return most if self.positions is None else min(most, self.positions - length)

    def keep(self, chat: Chat, messages: Sequence[Message], text: str, finished: bool) -> None:
        """Add an answer to the conversation, or note why it ends before it."""
        if not finished and not self.run.regenerate.keep_unfinished:
            chat.dropped = "unfinished"
        elif not text.strip():
            chat.dropped = "empty"
        else:
            chat.messages = [*messages, {"role": "assistant", "content": text}]


def end_tokens(named: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: those the target names, and its tokenizer's."""
    ends = {named} if isinstance(named, int) or named is None else set(named)
    return sorted({*ends, tokenizer.eos_token_id} - {None})
