"""All prompts of a run, tokenized once and kept in a few flat tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..errors import DataError
from ..progress import track
from ..target.tokenizer import chat_template
from ..types import Prompt
from .chat import Row, encode
from .sources import Conversation, Rows, nothing_left, scan


class PromptSet(Sequence[Prompt]):
    """Tokenized conversations, 5 bytes a token.  Prompt i has index i."""

    def __init__(self, input_ids: Tensor, loss_mask: Tensor, offsets: Tensor) -> None:
        self._input_ids = input_ids  # [tokens] int32
        self._loss_mask = loss_mask  # [tokens] int8
        self._offsets = offsets  # [prompts + 1] int64

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        span = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return Prompt(
            index=index,
            input_ids=self._input_ids[span].long(),
            loss_mask=self._loss_mask[span].long(),
        )

    @property
    def num_tokens(self) -> int:
        return len(self._input_ids)

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is supervised, [V] int64."""
        return torch.bincount(self._input_ids[self._loss_mask.bool()], minlength=vocab_size)


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, source_rows: Rows
) -> PromptSet:
    """Read and tokenize `data.train`, with progress.

    Raises DataError for bad data, for rows longer than `data.max_length` when
    `data.too_long` is "raise", and for token ids the target does not have.
    """
    if not data.train:
        raise DataError("data.train names no file. Try: data.train=[FILE.jsonl]")
    chat_template(tokenizer)  # a missing template is no fault of the first line
    ids, mask, offsets = array("i"), array("b"), array("q", [0])
    used = 0
    first_bad: DataError | None = None
    with track("reading conversations", data.limit) as progress:
        for found in scan(data.train, data, source_rows, need_answer=True):
            try:
                rows = _encode(found, data, tokenizer)
            except DataError as exc:
                if data.on_error == "raise":
                    raise
                first_bad = first_bad or exc
                continue
            used += 1
            for where, row in rows:
                fitting = _fit(row, data, where)
                if fitting is None:
                    continue
                check_ids(fitting.input_ids, vocab_size, where)
                ids.extend(fitting.input_ids)
                mask.extend(fitting.loss_mask)
                offsets.append(len(ids))
            progress.advance(note=f"{len(ids):,} tokens")
            if used == data.limit:
                break
    if not used:
        raise nothing_left(data.train, first_bad)
    if not ids:
        raise DataError(
            f"none of {used} conversations has an answer within data.max_length="
            f"{data.max_length} tokens. Try: data.max_length=4096"
        )
    return PromptSet(
        torch.frombuffer(ids, dtype=torch.int32),
        torch.frombuffer(mask, dtype=torch.int8),
        torch.frombuffer(offsets, dtype=torch.int64),
    )


def _encode(
    found: Conversation | DataError, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, Row]]:
    if isinstance(found, DataError):
        raise found
    try:
        rows = encode(tokenizer, found.messages, data.chat_template_kwargs)
    except DataError as exc:
        raise DataError(f"{found.where}: {exc}") from exc
    return [(found.where, row) for row in rows]


def _fit(row: Row, data: DataConfig, where: str) -> Row | None:
    """Apply `data.too_long`; None where nothing supervised is left."""
    length = len(row.input_ids)
    if length > data.max_length:
        if data.too_long == "raise":
            raise DataError(
                f"{where}: {length} tokens, longer than data.max_length={data.max_length}. "
                f"Try: data.max_length={length}, or data.too_long=truncate (or skip)"
            )
        if data.too_long == "skip":
            return None
        row = Row(row.input_ids[: data.max_length], row.loss_mask[: data.max_length])
    return row if any(row.loss_mask) else None


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise DataError where a token is not in the target's vocabulary."""
    if max(ids) >= vocab_size:
        raise DataError(
            f"{where}: token id {max(ids)} is beyond the target's vocabulary of {vocab_size}, so "
            "tokenizer and model do not belong together. Try: target.path=, a directory with both"
        )
