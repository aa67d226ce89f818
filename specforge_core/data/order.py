"""The order samples are seen in: one place, so that capture, offline and online agree.

A function of the seed, the epoch and the sample alone.  With a window, samples are shuffled in
groups of that many which follow each other, so that those of the first group are enough to begin;
the first epoch may have one of its own, as later ones find all samples there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..draws import draws_of

KEPT = 4  # groups whose order is remembered


def epoch_order(num_samples: int, seed: int, epoch: int, window: int | None = None) -> list[int]:
    """Return the permutation of 0..num_samples-1 of one epoch, the same on every rank."""
    size = window or num_samples
    starts = range(0, num_samples, max(size, 1))
    return [
        start + place
        for group, start in enumerate(starts)
        for place in _shuffled(min(size, num_samples - start), seed, epoch, group).tolist()
    ]


def _shuffled(size: int, seed: int, epoch: int, group: int) -> Tensor:
    first = (seed << 20) + epoch
    draws = draws_of(first, group) if group else torch.Generator().manual_seed(first)
    return torch.randperm(size, generator=draws)


@dataclass(slots=True)
class Order:
    """The endless sequence of all epochs, of samples whose number may not be known yet."""

    seed: int
    window: int | None
    known: Callable[[int | None], int]  # waits for so many samples, or all; says how many there are
    first: int | None = None  # the window of the first epoch, if it has one of its own
    _groups: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def at(self, place: int) -> tuple[int, int]:
        """Return the epoch and the sample at a place; waits for the samples it is shuffled with."""
        window = self._window(0)
        there = self.known(None if window is None else (place // window + 1) * window)
        epoch, within = divmod(place, there) if place >= there else (0, place)
        return epoch, self.shuffled(epoch, within, there)

    def shuffled(self, epoch: int, within: int, there: int) -> int:
        """Return the sample at a place of an epoch; `there` are known, all of its group."""
        whole = self._window(epoch) or there
        group, place = divmod(within, whole)
        size = min(whole, there - group * whole)
        key = (epoch, group, size)
        if (found := self._groups.pop(key, None)) is None:
            while len(self._groups) >= KEPT:
                del self._groups[next(iter(self._groups))]  # unused for the longest time
            found = _shuffled(size, self.seed, epoch, group)
        self._groups[key] = found
        return group * whole + int(found[place])

    def _window(self, epoch: int) -> int | None:
        return self.window if epoch or self.first is None else self.first
