"""What the loop knows of a step, and what users, trackers and checkpoints are told of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import RunConfig
from ..packages import versions
from ..plugins import CORE
from ..records import recorded
from ..strategy import Strategy
from .course import Course
from .feed import Feed
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


def run_info(
    run: RunConfig, strategy: Strategy, feed: Feed, course: Course, step: int, logged: int
) -> dict[str, object]:
    """Return what trackers are told of a run that goes on after `step`."""
    return {
        "step": step,
        "logged": logged,
        "total_steps": course.total_steps,
        "strategy": strategy.name,
        "rows_skipped": dict(feed.skipped),  # by reason
        "target": run.target.path,
        "output_dir": str(run.output_dir),
        "config": recorded(run),
        "versions": computed_with(strategy),
    }


def computed_with(strategy: Strategy) -> dict[str, str]:
    """Return the versions of what a run is computed with."""
    return versions(CORE, "torch", "transformers") | {"strategy": strategy.package}
