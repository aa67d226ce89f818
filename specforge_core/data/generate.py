"""Answers of the target in this process: batched, left-padded, turn by turn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..capture.hf import TransformersEngine
from ..config import RunConfig
from .respond import Chat, Rules, Task, end_tokens


class Generator:
    """An Answerer with the target in this process.

    Batches are planned over all conversations, done or not, and draws are seeded by
    batch: a run that was killed and resumed writes what one run would have.
    """

    def __init__(self, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.num_tokens = 0
        self.seconds = 0.0
        engine = TransformersEngine.load(run.target)
        self.model: Any = engine.model
        info = engine.info
        positions = info.config.get("max_position_embeddings")
        self.rules = Rules(run, tokenizer, info.vocab_size, positions)
        self.ends = end_tokens(self.model.generation_config.eos_token_id, tokenizer)
        # else generate() fills in what the model's authors recommend: a repetition penalty, ...
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def answer(self, tasks: Sequence[Task], done: Set[str]) -> Iterator[list[Chat]]:
        """Yield every batch with a conversation that is not done."""
        for batch in plan(tasks, self.run.regenerate.batch_size):
            if any(task.id not in done for task in batch):
                yield self.answer_batch(batch)

    def answer_batch(self, batch: Sequence[Task]) -> list[Chat]:
        """Answer the turns of every conversation, up to the first answer that is not kept."""
        chats = [Chat(task) for task in batch]
        for turn in range(max(len(task.turns) for task in batch)):
            asked = []
            for chat in chats:
                if chat.dropped is None and turn < len(chat.task.turns):
                    messages = [*chat.messages, *chat.task.turns[turn]]
                    if (prompt := self.rules.prompt(chat, messages)) is not None:
                        asked.append((chat, messages, prompt))
            if asked:
                seed = f"{self.run.regenerate.seed}/{asked[0][0].task.id}/{turn}"
                found = self._generate([prompt for _, _, prompt in asked], seed)
                for (chat, messages, _), tokens in zip(asked, found, strict=True):
                    finished = tokens[-1] in self.ends
                    text = str(self.tokenizer.decode(tokens[: len(tokens) - finished]))
                    self.rules.keep(chat, messages, text, finished)
        return chats

    def _generate(self, prompts: Sequence[list[int]], seed: str) -> list[list[int]]:
        """Continue every prompt; answers end in an end-of-turn token, unless cut off."""
        start = time.perf_counter()
        settings = self.run.regenerate
        longest = max(map(len, prompts))
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature}
            sampling |= {"top_p": settings.top_p, "top_k": 0}
            torch.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.rules.room(longest),
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


def plan(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Yield batches of like lengths, the longest first: what does not fit in memory shows early."""
    ordered = sorted(tasks, key=lambda task: -task.length)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
