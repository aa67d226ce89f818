"""Acceptance lengths with their small-sample bounds, compared on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 0.03  # relative difference of two acceptance lengths that is no difference


@dataclass(frozen=True, slots=True)
class Tally:
    """One prompt's part of a mean: what was emitted, and in how many verifications."""

    emitted: float
    verifications: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """An acceptance length over prompts; `refused` says why there is none."""

    name: str
    tallies: tuple[Tally, ...]
    refused: str | None = None

    @property
    def value(self) -> float | None:
        """Sum of emitted over sum of verifications; None when nothing was verified."""
        return ratio(self.tallies)

    @property
    def bound(self) -> float | None:
        """Half of the 95 % interval of the value, over the value."""
        if self.value is None:
            return None
        return _bound(_influences(self.tallies))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two measurements of what should be the same number, paired by prompt."""

    left: str
    right: str
    difference: float | None  # right over left, minus 1; None where one was refused
    bound: float | None  # of the difference: what chance explains, with 95 % confidence

    @property
    def differs(self) -> bool:
        """Beyond 3 %, and beyond what so few prompts leave open; or refused."""
        if self.difference is None or self.bound is None:
            return True
        return abs(self.difference) > max(TOLERANCE, self.bound)


def compare(left: Measurement, right: Measurement) -> Comparison:
    """Compare two measurements of the same prompts.

    The bound is a normal interval of the ratio's linear approximation over prompts,
    widened by Student's t for few of them.
    """
    one, other = left.value, right.value
    if one is None or other is None:
        return Comparison(left.name, right.name, None, None)
    shifts = [
        b - a for a, b in zip(_influences(left.tallies), _influences(right.tallies), strict=True)
    ]
    return Comparison(left.name, right.name, other / one - 1, _bound(shifts) * other / one)


def ratio(tallies: Sequence[Tally]) -> float | None:
    """Return the mean over verifications."""
    count = sum(t.verifications for t in tallies)
    return sum(t.emitted for t in tallies) / count if count else None


def _influences(tallies: Sequence[Tally]) -> list[float]:
    """Return by how much of itself each prompt moves the ratio."""
    value, total = ratio(tallies), sum(t.emitted for t in tallies)
    assert value is not None
    return [(t.emitted - value * t.verifications) / total for t in tallies]


def _bound(influences: Sequence[float]) -> float:
    count = len(influences)
    if count < 2:
        return math.inf
    spread = math.sqrt(count / (count - 1) * sum(x * x for x in influences))
    return student(count - 1) * spread


def student(degrees: int) -> float:
    """Return the 97.5 % point of Student's t, to 1 % from 3 degrees of freedom on."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
