"""Which checkpoint of a run is the best one, and whether a better one is still to be expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..watched import Watched

# by train.keep_best: the name in metrics.jsonl, and whether more is better
METRICS = {"acceptance": ("acceptance/length", True), "validation_loss": ("validation/loss", False)}


@dataclass(slots=True)
class Best:
    """Follows one measured number over a run."""

    metric: str  # its name in metrics.jsonl
    more: bool  # is better
    patience: int | None
    step: int | None = None  # of the best checkpoint
    value: float = math.nan
    since: int = 0  # measurements behind it

    @classmethod
    def of(cls, config: Watched) -> Best | None:
        """Return what `train.keep_best` asks for."""
        if config.keep_best is None:
            return None
        return cls(*METRICS[config.keep_best], config.patience)

    def take(self, step: int, values: Mapping[str, float], *, usable: bool = True) -> bool:
        """Learn what was measured at a step; say whether that is better than all before.

        Of two that are equal the earlier one is the best.  `usable` says that the step's
        checkpoint is there, or can be made.
        """
        value = values.get(self.metric)
        if value is None:
            return False
        better = self.step is None or (value > self.value if self.more else value < self.value)
        if better and usable and math.isfinite(value):
            self.step, self.value, self.since = step, value, 0
            return True
        self.since += 1
        return False

    @property
    def over(self) -> bool:
        """Whether the run waited for a better one as long as it was told to."""
        return self.patience is not None and self.since >= self.patience
