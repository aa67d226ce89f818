"""All prompts of a run, tokenized once and kept in a few flat tensors."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..errors import DataError
from ..progress import console, track
from ..target.tokenizer import chat_template, template_options
from ..types import Prompt
from .chat import Encoder, Row
from .rows import RowMaker
from .sources import BadRow, Rows, Skipped, conversations, mixed, nothing_left
from .tokenrows import Fingerprint


class PromptSet(Sequence[Prompt]):
    """Tokenized conversations, 5 bytes a token.  Prompt i has index i."""

    def __init__(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        offsets: Tensor,
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self._input_ids = input_ids  # [tokens] int32
        self._loss_mask = loss_mask  # [tokens] int8
        self._offsets = offsets  # [prompts + 1] int64
        self.skipped = dict(skipped or {})  # reason -> rows left out

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
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    source_rows: Rows,
    *,
    positions: int | None = None,
    ends: frozenset[int] = frozenset(),
    target: str | None = None,
) -> PromptSet:
    """Read and tokenize `data.train`, with progress; rows that are left out are told of by reason.

    `positions` are the tokens that the target takes, `ends` those that end its answers, `target`
    is its fingerprint: tokens that `regenerate` wrote must be of it.  Raises
    DataError for bad data, for rows longer than `data.max_length` or the target's positions when
    `data.too_long` is "raise", and for token ids the target does not have.
    """
    if not data.train:
        raise DataError("data.train names no file. Try: data.train=[FILE.jsonl]")
    chat_template(tokenizer)  # a missing template is no fault of the first line
    limit = min(data.max_length, positions or data.max_length)
    encoder = Encoder(tokenizer, template_options(data), limit, ends)
    make = RowMaker(encoder, Fingerprint.of(tokenizer, target))
    ids, mask, offsets = array("i"), array("b"), array("q", [0])
    used, skipped = 0, Skipped(data.on_error)
    # all of them before any work: a misspelled last one should not cost an hour
    opened = [(source, source_rows(source, data)) for source in data.train]
    with track("reading conversations", data.limit) as progress:
        for found in mixed(conversations(opened, data, need_answer=True), data.mix):
            if isinstance(found, DataError):
                skipped.add(found)
                continue
            try:
                rows = make(found)
            except BadRow as exc:
                skipped.add(exc.at(found.where))
                continue
            used += 1
            for row in rows:
                if (reason := _left_out(row, data, limit, found.where)) is not None:
                    skipped.counts[reason] += 1
                    continue
                check_ids(row.input_ids, vocab_size, found.where)
                ids.extend(row.input_ids)
                mask.extend(row.loss_mask)
                offsets.append(len(ids))
            progress.advance(note=f"{len(ids):,} tokens")
            if used == data.limit:
                break
    if not used:
        raise nothing_left(data.train, skipped.first)
    if not ids:
        raise DataError(
            f"none of {used} conversations has an answer within {bound_of(data, limit)}. "
            "Try: other data, or data.max_length=4096"
        )
    if skipped.counts:
        console.print(f"data.train: {skipped}", markup=False)
    return PromptSet(
        torch.frombuffer(ids, dtype=torch.int32),
        torch.frombuffer(mask, dtype=torch.int8),
        torch.frombuffer(offsets, dtype=torch.int64),
        skipped.counts,
    )


def _left_out(row: Row, data: DataConfig, limit: int, where: str) -> str | None:
    """Return why a row is not trained on, if it is not; `data.too_long` may make it an error."""
    if row.length > limit and data.too_long == "raise":
        raise DataError(_too_long(row, data, limit, where))
    if row.length > limit and data.too_long == "skip":
        return "too long"
    if not any(row.loss_mask):
        return "without an answer in data.max_length" if row.length > limit else "without an answer"
    return None


def bound_of(data: DataConfig, limit: int) -> str:
    """Return what makes `limit` the longest row: the config, or the target."""
    if limit < data.max_length:
        return f"the target's {limit} positions"
    return f"data.max_length={limit} tokens"


def _too_long(row: Row, data: DataConfig, limit: int, where: str) -> str:
    length = f"{row.length}" if row.counted else f"more than {row.length}"
    larger = row.counted and limit == data.max_length
    longer = f"data.max_length={row.length}, or " if larger else ""
    return (
        f"{where}: {length} tokens, longer than {bound_of(data, limit)}. "
        f"Try: {longer}data.too_long=truncate (or skip)"
    )


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise DataError where a token is not in the target's vocabulary."""
    if max(ids) >= vocab_size:
        raise DataError(
            f"{where}: token id {max(ids)} is beyond the target's vocabulary of {vocab_size}, so "
            "tokenizer and model do not belong together. Try: target.path=, a directory with both"
        )
