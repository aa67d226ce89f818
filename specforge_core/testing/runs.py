"""For tests of a method under `specforge train`: a run's config, its processes and its metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig
from ..load import load_config
from ..strategy import Strategy
from .forked import SECONDS, Forked
from .toy import write_conversations

__all__ = ["SECONDS", "as_made", "cli", "finish", "lines", "load", "losses", "write_run"]


def as_made(place: Path, make: Callable[[Path], object]) -> None:
    """Have `place` hold what `make` puts there: made once, and then copied for every test.

    The copies lie where the files were made, so that paths in them stay right.
    """
    shutil.rmtree(place, ignore_errors=True)
    kept = place.with_name("kept")
    if not kept.exists():
        place.mkdir()
        make(place)
        place.rename(kept)
    shutil.copytree(kept, place, symlinks=True)  # `best` is one


def write_run(
    directory: Path, target: Path, /, *, conversations: int, **sections: Mapping[str, Any]
) -> Path:
    """Write the config of a run in float32 on a CPU over ragged conversations; return its path.

    It reads `directory`/train.jsonl and writes to `directory`/run.  What `sections` say of
    strategy, train, ... is added to it.
    """
    data = write_conversations(directory / "train.jsonl", conversations)
    raw: dict[str, Any] = {
        "target": {"path": str(target), "dtype": "float32"},
        "data": {"train": [str(data)]},
        "capture": {"window": 4},
        "output_dir": str(directory / "run"),
        # not "auto": what tests compare is then the same on every processor
        "train": {"log_every": 1, "device": "cpu", "compute_dtype": "float32"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def load(config: Path, *overrides: str) -> tuple[RunConfig, Strategy]:
    """Load a config as the commands do."""
    return load_config(config, overrides)


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """Return a run's logged steps, and its measurements."""
    text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def losses(output_dir: Path) -> list[float]:
    """Return the loss of every logged step."""
    return [row["loss"] for row in lines(output_dir) if "loss" in row]


def cli(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `specforge` with arguments in a process of its own; `options` are Popen's."""
    command = [sys.executable, "-m", "specforge_core.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process: subprocess.Popen[str] | Forked) -> str:
    """Wait for a process that must succeed; return what it printed."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return out
