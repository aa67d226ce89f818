"""From a reader, or straight from the target, to the batches one rank trains on.

Rank r of W takes positions r, r + W, r + 2W ... of the endless sequence of
epochs, so the ranks together see what one process would.  A sample that the
transform drops is replaced by the next one of the same rank, so that all
ranks stay in step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..capture.worker import capture_in_order
from ..errors import DataError
from ..progress import console
from ..types import (
    Adapter,
    Batch,
    Collate,
    GrowingReader,
    Prompt,
    Reader,
    Sample,
    TargetEngine,
    Transform,
)
from .order import epoch_order

POLL_SECONDS = 0.2  # between two looks at a capture that is still being written
NOTE_SECONDS = 30.0  # between two lines that say so


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data one rank sees, and in which order."""

    rank: int
    world_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-batch and where the rank's stream stands after it."""

    batch: Batch
    position: int
    num_samples: int
    num_tokens: int


class Source(Protocol):
    """Yields one rank's samples in stream order, from a position on, without end."""

    def samples(self, position: int, /) -> Iterator[tuple[int, Sample | None]]: ...


@dataclass(slots=True)
class StoredSource:
    """Samples of a capture directory; the first epoch reads them as they were stored."""

    reader: Reader
    share: Share
    wait_note: str = ""
    _order: dict[int, list[int]] = field(default_factory=dict)

    def samples(self, position: int) -> Iterator[tuple[int, Sample]]:
        while True:
            index = self._locate(position * self.share.world_size + self.share.rank)
            position += 1
            yield position, self.reader[index]

    def _locate(self, place: int) -> int:
        """Return the stored index at `place` of the endless sequence of epochs."""
        if isinstance(self.reader, GrowingReader) and place >= len(self.reader):
            self._wait(place)
        total = len(self.reader)
        epoch, within = divmod(place, total)
        if epoch == 0:
            return within
        if epoch not in self._order:
            self._order = {epoch: epoch_order(total, self.share.seed, epoch)}
        return self._order[epoch][within]

    def _wait(self, place: int) -> None:
        assert isinstance(self.reader, GrowingReader)
        noted = time.monotonic()
        while not self.reader.refresh() and place >= len(self.reader):
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                console.print(f"waiting for sample {place}: {self.wait_note}", markup=False)
            time.sleep(POLL_SECONDS)
        if len(self.reader) == 0:
            raise DataError("the capture finished without a sample. Try: specforge verify DIR")


@dataclass(slots=True)
class OnlineSource:
    """Samples captured from the target as they are needed, never stored."""

    engine: TargetEngine
    adapter: Adapter
    prompts: Sequence[Prompt]
    share: Share
    window: int  # prompts grouped by length together

    def samples(self, position: int) -> Iterator[tuple[int, Sample | None]]:
        first = epoch_order(len(self.prompts), self.share.seed, 0)
        order: dict[int, list[int]] = {}
        # windows begin at fixed places, so that a resumed run batches as it did: another batch
        # would round differently
        wanted, position = position, position - position % self.window
        while True:
            chosen = []
            for ahead in range(self.window):
                place = (position + ahead) * self.share.world_size + self.share.rank
                epoch, within = divmod(place, len(first))
                if epoch and epoch not in order:
                    order = {epoch: epoch_order(len(first), self.share.seed, epoch)}
                chosen.append(self.prompts[first[order[epoch][within] if epoch else within]])
            captured = capture_in_order(self.engine, self.adapter, chosen, self.window)
            for _, sample in captured:
                position += 1
                if position > wanted:
                    yield position, sample


def micro_batches(
    source: Source,
    transform: Transform,
    collate: Collate,
    *,
    batch_size: int,
    position: int,
    epoch_length: int | None,
    device: torch.device,
) -> Iterator[Micro]:
    """Yield batches of `batch_size` samples on `device`, from `position` on, without end.

    Raises DataError when a whole epoch of `epoch_length` samples gave none to train on.
    """
    kept: list[Sample] = []
    barren = 0
    for after, stored in source.samples(position):
        sample = None if stored is None else transform(stored)
        if sample is None:
            barren += 1
            if epoch_length is not None and barren > epoch_length:
                raise DataError(
                    f"none of {epoch_length} samples can be trained on: each was skipped by the "
                    "strategy (too short, or nothing supervised). Check data.train and "
                    "data.max_length"
                )
            continue
        barren = 0
        kept.append(sample)
        if len(kept) == batch_size:
            tokens = sum(len(next(iter(s.values()))) for s in kept)
            yield Micro(to_device(collate(kept), device), after, len(kept), tokens)
            kept = []


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, through pinned memory when that is a GPU."""
    if device.type == "cpu":
        return batch
    moved = {}
    for name, tensor in batch.items():
        pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        moved[name] = pinned.to(device, non_blocking=True)
    return moved
