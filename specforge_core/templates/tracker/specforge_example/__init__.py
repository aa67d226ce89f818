"""Writes a run's numbers to a CSV file: step, name, value."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from specforge_core import hookimpl
from specforge_core.config import RunConfig, Section
from specforge_core.types import Tracker


class ExampleConfig(Section):
    """A run's numbers as CSV."""

    path: Path | None = Field(None, description="The file; none: OUTPUT_DIR/example.csv.")


class CsvTracker:
    """Appends a row for each number.  Only rank 0 has one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, info: Mapping[str, Any]) -> None:
        """Keep what is of steps before the one that the run begins at; `info` has its config."""
        rows = []
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if int(row[0]) <= info["step"]]
        self._write("w", rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one step's numbers."""
        self._write("a", [[str(step), name, str(value)] for name, value in metrics.items()])

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Hear of a checkpoint that was saved: `name` is "checkpoint", `values` has its step."""

    def close(self) -> None:
        """Close nothing: every row is on disk."""

    def _write(self, mode: str, rows: list[list[str]]) -> None:
        with self.path.open(mode, encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


@hookimpl
def specforge_plugin_config() -> type[ExampleConfig]:
    """Return the section `plugins.example`; without it in a run nothing here takes part."""
    return ExampleConfig


@hookimpl
def specforge_tracker(run: RunConfig) -> Tracker:
    """Return the tracker of a run that has the section."""
    options = run.plugins["example"]
    assert isinstance(options, ExampleConfig)
    return CsvTracker(options.path or run.output_dir / "example.csv")
