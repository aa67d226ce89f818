"""What is written, and that a resumed run writes no step twice."""

from __future__ import annotations

import csv
from pathlib import Path

from specforge_example import CsvTracker


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_number_is_a_row_and_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    tracker = CsvTracker(path)
    tracker.start({"step": 0})
    tracker.log(1, {"loss": 2.5, "tokens": 8.0})
    tracker.log(2, {"loss": 2.0, "tokens": 16.0})
    tracker.close()
    resumed = CsvTracker(path)
    resumed.start({"step": 1})
    resumed.log(2, {"loss": 1.5, "tokens": 16.0})
    assert rows(path) == [
        ["1", "loss", "2.5"],
        ["1", "tokens", "8.0"],
        ["2", "loss", "1.5"],
        ["2", "tokens", "16.0"],
    ]
