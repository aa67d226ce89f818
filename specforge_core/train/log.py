"""The lines of a run's metrics: means over the steps since the line before."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .metrics import Sums, Trackers


@dataclass(slots=True)
class Phases:
    """Seconds spent in each part of the step since the last log; first also in those of the start.

    A GPU works behind the host's back: the times are exact only with
    `train.profile`, which waits for it after each part.
    """

    exact: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(slots=True)
class Log:
    """What the steps since the last line came to.

    Windows end at multiples of `every`, wherever a run was interrupted: a checkpoint keeps
    `logged` and `window`, and the run that goes on from it fills the window up.  The line at the
    end of a run, between two multiples, ends no window.
    """

    every: int
    trackers: Trackers | None  # None on other ranks than the first, which keep the sums too
    phases: Phases
    logged: int = 0  # the step of the last line that ended a window
    window: Sums = field(default_factory=Sums)
    since: float = field(default_factory=time.monotonic)
    tokens: int = 0  # trained on by then
    told: dict[str, float] = field(default_factory=dict)  # of the last step, beside the means
    before: float = math.nan  # the loss of the last line

    @property
    def loss(self) -> float:
        """The mean loss since the last line, or, right behind a line, that line's."""
        return self.window.ratios().get("loss", self.before)

    def rate(self, tokens: int) -> float:
        """Return the tokens per second since the last line, with `tokens` trained on in all.

        Right behind a line, that line's.
        """
        if tokens == self.tokens:
            return self.told.get("tokens_per_second", 0.0)
        return (tokens - self.tokens) / max(time.monotonic() - self.since, 1e-9)

    def note(self, tokens: int) -> str:
        """Return what progress shows of the steps since the last line; "" while none is read."""
        if math.isnan(self.loss):
            return ""
        return f"loss {self.loss:.3f}  {self.rate(tokens):,.0f} tokens/s"

    def line(self, step: int, values: dict[str, float]) -> None:
        """Write a line if one is due after `step`, with `values` beside the means."""
        self.told = values
        if step % self.every == 0:
            self._write(step)
            self.before = self.loss
            self.logged, self.window = step, Sums()
            self.since, self.tokens = time.monotonic(), int(values["tokens"])

    def rest(self, step: int) -> None:
        """Write what no line has had yet, after the last step of this process."""
        if self.window.values and step % self.every:
            self._write(step)

    def _write(self, step: int) -> None:
        if self.trackers is not None:
            spent = {f"seconds_{name}": seconds for name, seconds in self.phases.seconds.items()}
            self.trackers.log(step, self.window.ratios() | self.told | spent)
        self.phases.seconds.clear()
