"""Stored samples are read by threads, before they are asked for, and come in their order."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch

from specforge_core.batches.stored import AHEAD, StoredSource
from specforge_core.errors import CaptureError
from specforge_core.types import Sample

from .sources import ALONE, Growing, Stored

SECONDS = 20.0


class Slow(Stored):
    """Its first sample is ready only once others were read beside it."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        super().__init__(count)
        self.others, self.bad = threading.Semaphore(0), bad

    def __getitem__(self, index: int) -> Sample:
        if index == self.bad:
            raise CaptureError(f"sample {index} is damaged")
        if index == 0:
            assert self.others.acquire(timeout=SECONDS)
            assert self.others.acquire(timeout=SECONDS)
        else:
            self.others.release()
        return super().__getitem__(index)


def test_a_slow_sample_holds_up_no_other_and_keeps_its_place() -> None:
    found = islice(StoredSource(Slow(7), ALONE).samples(0), 7)
    assert [placed.index for placed in found] == list(range(7))


def test_a_sample_that_cannot_be_read_is_an_error_where_its_turn_is() -> None:
    found = StoredSource(Slow(7, bad=3), ALONE).samples(0)
    assert [placed.index for placed in islice(found, 3)] == [0, 1, 2]
    with pytest.raises(CaptureError, match="sample 3 is damaged"):
        next(found)


def test_of_a_growing_capture_no_sample_is_waited_for_before_its_turn() -> None:
    """All that are there are read ahead; asking for the next one looks for more."""
    reader = Growing(AHEAD + 3)
    for _ in range(3):
        reader.refresh()
    source = StoredSource(reader, ALONE).samples(0)
    assert [next(source).index for _ in range(3)] == [0, 1, 2]
    assert reader.count == 3
    assert torch.equal(next(source).sample["input_ids"], torch.full((4,), 3))  # type: ignore[index]
    assert reader.count == 4
