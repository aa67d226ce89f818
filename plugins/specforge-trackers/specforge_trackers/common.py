"""What the trackers share: the name of a run, and the picture of its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specforge_core import stop
from specforge_core.errors import CheckpointError, ConfigError

ABOUT = ("strategy", "target", "versions", "config")  # of what `start` is told


def need(library: str) -> None:
    """Raise ConfigError where a tracker's library is not installed."""
    if find_spec(library) is None:
        raise ConfigError(
            f"plugins.{library} needs the package {library}, which is not installed. "
            f"Try: pip install 'specforge-trackers[{library}]'"
        )


def about(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tracker keeps of a run's start."""
    return {key: info[key] for key in ABOUT}


def as_text(values: Mapping[str, Any]) -> str:
    """Return an event's values as JSON."""
    return json.dumps(values, indent=2, ensure_ascii=False, default=str)


def picture(output_dir: Path) -> bytes | None:
    """Return the run's curves as PNG; None where nothing was logged, or a signal ends the run."""
    if stop.asked() is not None:  # seconds are left, for what was logged
        return None
    from specforge_core.evaluate.compare import draw_runs

    try:
        return draw_runs([output_dir])
    except CheckpointError:
        return None
