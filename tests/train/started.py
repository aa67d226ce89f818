"""Training in processes of its own that tests send signals to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from specforge_core import stop
from specforge_core.claim import LOCK
from specforge_core.testing import runs
from specforge_core.testing.forked import cli

from ..processes import Process

LONG = ("train.max_steps=100000", "train.save_every=100000")  # it does not end by itself


def start(
    config: Path, ranks: int, *options: str, env: Any = None, imports: bool = False
) -> Process:
    """Start training; with `imports` in processes that start Python, as everybody's do."""
    begin: Any = runs.cli if imports else cli
    process: Process = begin(
        *("train", "-c", str(config), "--nproc", str(ranks), *options),
        env=env,
    )
    return process


def left_nothing(folder: Path, began: float) -> bool:
    """Say whether a command that was asked to end after `began` has taken its folder along.

    A signal that meets Python in a finalizer, as imports have many, is lost there.  The thread that
    watches ends the command then, SECONDS later and at once, so that its empty folder stays.
    """
    if time.monotonic() - began < stop.SECONDS:
        return not folder.exists()
    return not folder.exists() or [path.name for path in folder.iterdir()] == [LOCK]


def num_lines(tmp_path: Path) -> int:
    metrics = tmp_path / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
