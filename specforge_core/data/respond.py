"""The target answering conversations: batched, left-padded, turn by turn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..capture.hf import TransformersEngine
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


class Responder:
    """The target, answering batches of conversations turn by turn."""

    def __init__(self, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.num_tokens = 0
        self.seconds = 0.0
        engine = TransformersEngine.load(run.target)
        self.model: Any = engine.model
        self.vocab_size = engine.info.vocab_size
        self.positions: int | None = engine.info.config.get("max_position_embeddings")
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self.ends: list[int] = sorted(ends)
        # else generate() fills in what the model's authors recommend: a repetition penalty, ...
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def answer(self, batch: Sequence[Task]) -> list[Chat]:
        """Answer the turns of every conversation, up to the first answer that is not kept."""
        chats = [Chat(task) for task in batch]
        for turn in range(max(len(task.turns) for task in batch)):
            asked = []
            for chat in chats:
                if chat.dropped is None and turn < len(chat.task.turns):
                    messages = [*chat.messages, *chat.task.turns[turn]]
                    if (prompt := self._prompt(chat, messages)) is not None:
                        asked.append((chat, messages, prompt))
            if asked:
                seed = f"{self.run.regenerate.seed}/{asked[0][0].task.id}/{turn}"
                found = self._generate([prompt for _, _, prompt in asked], seed)
                for (chat, messages, _), tokens in zip(asked, found, strict=True):
                    self._keep(chat, messages, tokens)
        return chats

    def _prompt(self, chat: Chat, messages: list[Message]) -> list[int] | None:
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

    def _generate(self, prompts: Sequence[list[int]], seed: str) -> list[list[int]]:
        """Continue every prompt; answers end in an end-of-turn token, unless cut off."""
        start = time.perf_counter()
        settings = self.run.regenerate
        longest = max(map(len, prompts))
        room = (self.positions or longest + settings.max_new_tokens) - longest
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature}
            sampling |= {"top_p": settings.top_p, "top_k": 0}
            torch.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=min(settings.max_new_tokens, room),
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            **sampling,
        )
        device = self.model.device
        rows = self.model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
        answers = [self._cut(row) for row in rows[:, longest:].tolist()]
        self.num_tokens += sum(map(len, answers))
        self.seconds += time.perf_counter() - start
        return answers

    def _cut(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: end + 1]

    def _keep(self, chat: Chat, messages: list[Message], tokens: list[int]) -> None:
        finished = tokens[-1] in self.ends
        if not finished and not self.run.regenerate.keep_unfinished:
            chat.dropped = "unfinished"
            return
        text = str(self.tokenizer.decode(tokens[: len(tokens) - finished]))
        if not text.strip():
            chat.dropped = "empty"
            return
        chat.messages = [*messages, {"role": "assistant", "content": text}]
