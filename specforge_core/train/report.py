"""What the loop knows of a step, and `specforge train` tells of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .metrics import Reduced


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished (or stopped) run reached."""

    step: int
    total_steps: int
    num_tokens: int
    seconds: float
    checkpoint: Path
    finished: bool  # the schedule came to its end, by steps or by time


@dataclass(frozen=True, slots=True)
class Launched:
    """One optimizer step that the device was given; what came of it is read later."""

    step: int  # from 1
    reduced: Reduced
    learning_rate: float
    indices: tuple[int, ...]  # of this rank's samples
    before: int  # the run's position before it
