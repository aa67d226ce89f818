"""All prompts of a run in a few flat tensors, in memory or in files."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, overload

import torch
from torch import Tensor

from ..types import Prompt
from .chat import Row

PIECE = 1 << 22  # tokens that are counted at once
SHOWN = 64  # rows after which others can read them


@dataclass(frozen=True, slots=True)
class Told:
    """What there is to tell of data that was tokenized."""

    conversations: int = 0  # that were used
    cut: int = 0  # rows that were longer than they may be
    skipped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows left out
    sources: Sequence[int] = ()  # conversations used of each source
    other_side: int = 0  # conversations left to the other side of `data.validation`
    least: float | None = None  # the part that holds out one, where that of the config does not


class PromptSet(Sequence[Prompt]):
    """Tokenized conversations, 5 bytes a token.  Prompt i has index i."""

    def __init__(
        self, input_ids: Tensor, loss_mask: Tensor, offsets: Tensor, told: Told | None = None
    ) -> None:
        self._input_ids = input_ids  # [tokens] int32
        self._loss_mask = loss_mask  # [tokens] int8
        self._offsets = offsets  # [prompts + 1] int64
        self.told = told or Told()

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

    def wait(self, count: int | None = None) -> int:
        """Return how many there are: all of them."""
        return len(self)

    def stop(self) -> None:
        """Stop nothing: all of them are there."""

    def close(self) -> None:
        """Close nothing: memory and mapped files close themselves."""

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> rows left out."""
        return dict(self.told.skipped)

    @property
    def num_tokens(self) -> int:
        return len(self._input_ids)

    @property
    def num_supervised(self) -> int:
        return int(self._loss_mask.count_nonzero())

    @property
    def lengths(self) -> Tensor:
        """Return the tokens of each prompt, [prompts] int64."""
        return self._offsets.diff()

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is supervised, [V] int64."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for start in range(0, self.num_tokens, PIECE):
            span = slice(start, start + PIECE)
            ids = self._input_ids[span][self._loss_mask[span].bool()]
            counts += torch.bincount(ids, minlength=vocab_size)
        return counts


class Joined:
    """Several sets of prompts, one behind the other.  Prompt i has index i."""

    def __init__(self, first: PromptSet) -> None:
        self._parts = [first]
        self._ends = [len(first)]

    def add(self, part: PromptSet) -> None:
        """Put a set behind the others."""
        self._parts.append(part)
        self._ends.append(self._ends[-1] + len(part))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Prompt:
        part = bisect_right(self._ends, index)
        within = index - (self._ends[part - 1] if part else 0)
        return replace(self._parts[part][within], index=index)

    def wait(self, count: int | None = None) -> int:
        """Return how many there are: all of them."""
        return len(self)

    def stop(self) -> None:
        """Stop nothing: all of them are there."""


def _nothing() -> None:
    """Let it go on."""


class Spool:
    """Takes rows, one behind the other, into two files (which may be in memory).

    With `index`, a third file, others can read what is there: it names no row that is not.
    """

    def __init__(
        self, input_ids: IO[bytes], loss_mask: IO[bytes], index: IO[bytes] | None = None
    ) -> None:
        self._input_ids, self._loss_mask, self._index = input_ids, loss_mask, index
        self.offsets = array("q", [0])
        self._shown = 0  # offsets in the index
        self.check: Callable[[], None] = _nothing  # called with every row: it may raise

    def add(self, row: Row) -> None:
        """Write a row.  Raises OSError."""
        self.check()
        self._input_ids.write(array("i", row.input_ids).tobytes())
        self._loss_mask.write(array("b", row.loss_mask).tobytes())
        self.offsets.append(self.num_tokens + len(row.input_ids))
        if len(self.offsets) - self._shown >= SHOWN:
            self.show()

    def show(self) -> None:
        """Let others read all rows so far.  Raises OSError."""
        if self._index is not None:
            for file in (self._input_ids, self._loss_mask):
                file.flush()
            self._index.write(self.offsets[self._shown :].tobytes())
            self._index.flush()
            self._shown = len(self.offsets)

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]
