"""How far a run goes, and where in its schedule of learning rates it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import TrainConfig
from ..errors import ConfigError


@dataclass(slots=True)
class Course:
    """A run over some steps, or over the samples of some epochs.

    A run over epochs counts samples, in steps of their present size: resumed with another batch
    size or number of ranks it still ends after its epochs, and its learning rate goes on where
    it was.
    """

    length: int | None  # samples of all epochs; None: total_steps decide
    total_steps: int  # those done and those to come
    per_step: int  # samples of a step, of all ranks; of steps of tokens, about
    minutes: float | None  # the run ends by then
    lag: int  # steps launched before the numbers of one are read, so that a GPU never runs dry
    spent: float = 0.0  # seconds after the last step that was read, by rank 0's clock
    read: int = 0  # that step
    time_up: bool = False  # another step would end too late

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        num_samples: int | None,
        ranks: int,
        lag: int,
        num_tokens: int | None = None,
    ) -> Course:
        """Return a run's course from its start; so many samples are in an epoch, None: not known.

        With `train.batch_tokens` a step's samples are as many as they are on average.
        """
        per_step = config.batch_size * config.accumulate * ranks
        if config.batch_tokens is not None:
            mean = (num_tokens or 0) / max(num_samples or 0, 1)
            tokens = config.batch_tokens * config.accumulate * ranks
            per_step = max(1, round(tokens / mean)) if mean else ranks
        length = None
        if config.max_steps is None:
            if num_samples is None:
                raise ConfigError(
                    "the capture is still growing, so its epochs cannot be counted. "
                    "Give the number of steps: train.max_steps=1000"
                )
            length = max(1, round(config.epochs * num_samples))
        total = config.max_steps or math.ceil((length or 0) / per_step)
        return cls(length, total, per_step, config.max_minutes, lag)

    def resume(self, step: int, position: int, seconds: float) -> None:
        """Go on after `step` steps, `position` samples and `seconds`."""
        self.go_on(step, position)
        self.watch(step, seconds)

    def go_on(self, step: int, position: int) -> None:
        """Learn how many samples `step` steps came to: the steps that are left follow from it."""
        if self.length is not None:
            self.total_steps = step + math.ceil(max(0, self.length - position) / self.per_step)

    @property
    def span(self) -> float:
        """The steps that the schedule is over, of their present size."""
        return self.total_steps if self.length is None else self.length / self.per_step

    def place(self, step: int, position: int) -> float:
        """Return where in the schedule the step after `step` and `position` is."""
        done = step if self.length is None else position / self.per_step
        if self.minutes is None:
            return done
        ends = self.spent + self._usual() * (step + 1 - self.read)
        return max(done, self.span * ends / (60 * self.minutes) - 1)

    def progress(self, place: float) -> float:
        """Return how far a place in the schedule is: 0 at the first step, 1 at the last."""
        return min(place / max(self.span - 1, 1), 1.0)

    def deadline(self, began: float) -> float:
        """Return when the run ends by a clock on which it `began`."""
        return math.inf if self.minutes is None else began + 60 * self.minutes

    def watch(self, step: int, seconds: float) -> None:
        """Learn that `step` ended after `seconds`, the same on all ranks."""
        self.read, self.spent = step, seconds
        if self.minutes is not None:
            self.time_up = seconds + self._usual() * (1 + self.lag) > 60 * self.minutes

    def _usual(self) -> float:
        return self.spent / max(self.read, 1)
