"""From a reader, or straight from the target, to the batches one rank trains on.

The samples of all epochs make one endless sequence, whose order hangs on (seed, epoch) alone.
W ranks take it in turns, a micro-batch of all of them after the other.  So a run's progress is one
number, the samples all ranks are done with, and goes on under any number of ranks.  A sample that
is dropped leaves its micro-batch smaller.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from ..capture.cache import StateCache, capture_through
from ..capture.samples import capture_in_order
from ..data.order import Order
from ..data.stream import Closed as Closed
from ..draws import draws_of
from ..errors import DataError
from ..locks import InTurn
from ..returned import wrong_tensors
from ..strategy import Strategy
from ..types import (
    Adapter,
    Batch,
    CaptureSpec,
    Collate,
    Counting,
    Prompt,
    Sample,
    TargetEngine,
    Transform,
)
from .collate import num_tokens, pinned
from .made import Made, device_of, to_device as to_device
from .prefetch import Prefetcher
from .stored import StoredSource as StoredSource
from .turns import Placed as Placed, Rows, Share as Share, Turn, supervised_rows, windows


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-batch."""

    batch: Batch
    position: int  # samples of the endless sequence that all ranks are done with after it
    num_samples: int  # 0: all were dropped, and the batch only stands in so that ranks keep step
    num_tokens: int
    indices: tuple[int, ...] = ()  # of the samples in it, as `Placed.index`
    made: Made | None = None  # when the batch is there, where another thread made it

    def arrive(self) -> None:
        """Have the device wait for the batch, before it is used by another thread."""
        if self.made is not None:
            self.made.wait(self.batch.values())


@dataclass(frozen=True, slots=True)
class Window:
    """Prompts that are captured together."""

    turns: list[Turn]
    done: int  # of them, before this run began
    numbers: list[tuple[int, int, int]]  # epochs, places in them and prompts
    captured: list[tuple[int, Sample | None]] | None  # None: not captured, for who asks
    made: Made


class Prompts(Protocol):
    """A run's prompts, which may still be read."""

    def wait(self, count: int | None, /) -> int:
        """Wait for so many prompts, or for all; return how many there are then."""
        ...

    def __getitem__(self, index: int, /) -> Prompt: ...
    def stop(self) -> None: ...


class Source(Protocol):
    """Yields one rank's samples from a position of the endless sequence on, without end.

    Those from `end` on are not trained on, if that is known.  Ranks have as many `rows` each.
    """

    def samples(
        self, position: int, /, end: int | None = None, rows: Rows = supervised_rows
    ) -> Iterator[Placed]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class OnlineSource:
    """Samples captured from the target as they are needed; kept where there is a cache."""

    strategy: Strategy
    engine: TargetEngine
    adapter: Adapter
    prompts: Prompts
    share: Share
    window: int  # prompts grouped by length together
    cache: StateCache | None = None
    lock: InTurn | None = None  # where others call the engine, too: held over each window
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End the wait for a prompt in another thread, and the capture of a window."""
        self.closed.set()
        self.prompts.stop()

    def samples(
        self, position: int, /, end: int | None = None, rows: Rows = supervised_rows
    ) -> Iterator[Placed]:
        """Yield this rank's samples; while those of a window are used, the next is captured."""
        order = Order(self.share.seed, self.share.window, self.prompts.wait, self.share.first)
        device = device_of(self.engine)
        found = self._windows(order, position, end, rows, device)
        windows = Prefetcher(found, 0, device, inner=True)
        try:
            for window in windows:
                captured = window.captured
                if captured is None:
                    captured = self._capture(window.numbers)
                if self.closed.is_set():
                    break
                for _, sample in captured:
                    window.made.wait(() if sample is None else sample.values())
                every = list(zip(window.turns, window.numbers, captured, strict=True))
                for turn, (epoch, number, _), (index, sample) in every[window.done :]:
                    yield Placed(epoch, number, index, sample, turn.reached, turn.counts)
            raise Closed
        finally:
            windows.close()

    def _windows(
        self, order: Order, position: int, end: int | None, rows: Rows, device: torch.device
    ) -> Iterator[Window]:
        """Yield each window in turn, captured unless it begins at `end` or later.

        Those of a resumed run are the same: in another batch a state would round differently.
        """

        def look(place: int) -> tuple[int, int]:
            epoch, _, prompt = self._number(order, place)
            return epoch, len(self.prompts[prompt].input_ids)

        def work(place: int) -> int:
            mask = self.prompts[self._number(order, place)[2]].loss_mask
            return rows(len(mask), int(mask.sum()))

        cut = (self.share, position, self.window, look, partial(self.prompts.wait, None))
        for turns, done in windows(*cut, end=end, work=work):
            use = end is None or turns[0].place < end
            if end is not None and use:  # nothing is captured for no use
                turns = [turn for turn in turns if turn.place < end]
            numbers = [self._number(order, turn.place) for turn in turns]
            captured = self._capture(numbers) if use else None
            if self.closed.is_set():
                return
            yield Window(turns, done, numbers, captured, Made(device))

    def _capture(self, numbers: Sequence[tuple[int, int, int]]) -> list[tuple[int, Sample | None]]:
        """Return a window's prompts and samples; fewer where this source is closed meanwhile."""
        chosen = [self.prompts[first] for _, _, first in numbers]
        how = (self.strategy, self.engine, self.adapter, chosen, self.window)
        found = []
        with self.lock or nullcontext():
            captured = (
                capture_in_order(*how) if self.cache is None else capture_through(self.cache, *how)
            )
            for one in captured:
                found.append(one)
                if self.closed.is_set():
                    break
            captured.close()  # before anybody else calls the engine
        return found

    def _number(self, order: Order, place: int) -> tuple[int, int, int]:
        """Return the epoch, the place in the first epoch and the prompt at a place."""
        epoch, found = order.at(place)
        if epoch == 0:
            return 0, place, found
        return epoch, found, order.shuffled(0, found, self.prompts.wait(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """What makes micro-batches of a source's samples."""

    strategy: Strategy
    spec: CaptureSpec
    transform: Transform
    collate: Collate
    share: Share
    batch_size: int
    device: torch.device
    end: int | None = None  # samples of the endless sequence that are trained on

    def micro_batches(self, source: Source, position: int) -> Generator[Micro]:
        """Yield batches of `batch_size` samples on the device, without end.

        From `end` on they have no samples, so that the last step of a run may be a smaller one.

        Raises DataError when a whole epoch gave no sample to train on.
        """
        counting = isinstance(self.transform, Counting)
        samples = source.samples(position, self.end, self._rows if counting else supervised_rows)
        try:
            yield from self._micro_batches(samples, position)
        finally:
            if isinstance(samples, Generator):
                samples.close()  # also where an error's traceback holds it

    def _micro_batches(self, samples: Iterator[Placed], position: int) -> Iterator[Micro]:
        ahead: deque[Placed] = deque()
        stand_in: list[Sample] = []
        while True:
            if self.share.tokens is None:
                left = min(self.batch_size, self._left(position))  # none is asked for without a use
                taken = [ahead.popleft() if ahead else next(samples) for _ in range(left)]
                position += self.batch_size * self.share.world_size
            else:
                taken, position = self._cut(samples, ahead, position)
            ready = [(placed.index, self._ready(placed)) for placed in taken if placed.counts]
            kept = [sample for _, sample in ready if sample is not None]
            indices = tuple(index for index, sample in ready if sample is not None)
            if not kept and not stand_in:
                # of less data than ranks some have none of their own, ever
                others = [self._ready(placed) for placed in taken if not placed.counts]
                stand_in = [one for one in others if one is not None]
                stand_in = stand_in or [self._look_ahead(samples, ahead)]
            tokens = sum(num_tokens(sample, self.spec) for sample in kept)
            with self.strategy.guard("specforge_collate"), pinned(self.device.type == "cuda"):
                batch = self.collate(kept or stand_in)
            self.strategy.check("specforge_collate", wrong_tensors(batch), value=self.collate)
            reached = position if self.end is None else min(position, self.end)
            moved = to_device(batch, self.device)
            yield Micro(moved, reached, len(kept), tokens, indices, Made(self.device))
            stand_in = kept[:1] or stand_in

    def _cut(
        self, samples: Iterator[Placed], ahead: deque[Placed], position: int
    ) -> tuple[list[Placed], int]:
        """Return the samples up to the end of a micro-batch of tokens, and the position there."""
        taken: list[Placed] = []
        while self.end is None or position < self.end:
            taken.append(ahead.popleft() if ahead else next(samples))
            if (reached := taken[-1].reached) is not None:
                return taken, reached
        return taken, position

    def _rows(self, tokens: int, supervised: int) -> int:
        assert isinstance(self.transform, Counting)
        with self.strategy.guard("specforge_transform"):
            return int(self.transform.rows(tokens, supervised))

    def _left(self, position: int) -> int:
        """Return how many of this rank's next samples are before the end."""
        if self.end is None:
            return self.batch_size
        return max(0, math.ceil((self.end - position - self.share.rank) / self.share.world_size))

    def _ready(self, placed: Placed) -> Sample | None:
        if placed.sample is None:
            return None
        generator = draws_of(self.share.seed, placed.epoch, placed.number)
        with self.strategy.guard("specforge_transform"):
            sample = self.transform(dict(placed.sample), generator)  # it may take fields out
        if sample is not None:
            self.strategy.check("specforge_transform", wrong_tensors(sample), value=self.transform)
        return sample

    def _look_ahead(self, samples: Iterator[Placed], ahead: deque[Placed]) -> Sample:
        """Return the next sample that can be trained on; what is before it waits in `ahead`."""
        for placed in samples:
            ahead.append(placed)
            if (sample := self._ready(placed)) is not None:
                return sample
            # as many as an epoch has, wherever this began: a rank sees its share of each
            if placed.epoch > ahead[0].epoch + self.share.world_size:
                break
        seen = {placed.number for placed in ahead}
        raise DataError(
            f"none of {len(seen)} samples can be trained on: each was skipped by the "
            "strategy (too short, or nothing supervised). Check data.train and data.max_length"
        )
