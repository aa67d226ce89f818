"""What trackers and checkpoints are told of a run."""

from __future__ import annotations

from ..config import RunConfig
from ..packages import version
from ..records import recorded
from ..strategy import Strategy
from .course import Course
from .feed import Feed


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
        "versions": versions(strategy),
    }


def versions(strategy: Strategy) -> dict[str, str]:
    """Return the versions of what a run is computed with."""
    names = ("specforge-core", "torch", "transformers")
    return {name: version(name) for name in names} | {"strategy": strategy.package}
