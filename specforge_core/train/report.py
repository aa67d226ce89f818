"""What `specforge train` tells of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished (or stopped) run reached."""

    step: int
    total_steps: int
    num_tokens: int
    seconds: float
    checkpoint: Path
    finished: bool  # the schedule came to its end, by steps or by time
