"""Training in processes of its own that tests send signals to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def num_lines(tmp_path: Path) -> int:
    metrics = tmp_path / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
