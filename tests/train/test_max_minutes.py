"""A run that must end in time ends at the end of its schedule."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from specforge_core.drafts import checkpoint
from specforge_core.testing.runs import lines, load
from specforge_core.train import trainer
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

LIMIT = ("train.max_steps=1000", "train.schedule=wsd", "train.save_every=1000")


class Clock:
    """Each look at the clock takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    perf_counter = staticmethod(time.perf_counter)


def test_the_schedule_ends_with_the_time(
    tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "time", Clock())
    config = linear_run(tmp_path, toy_target)
    report = train(*load(config, *LIMIT, "train.max_minutes=2"))
    assert report.finished
    assert 20 < report.step <= 60  # two or more looks at the clock a step
    assert report.seconds <= 122
    rates = [row["learning_rate"] for row in lines(tmp_path / "run")]
    assert rates[len(rates) // 2] == pytest.approx(0.05)
    assert rates[-1] < 0.2 * 0.05
    # the time before counts: nothing is left for a resumed run
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert (state.step, state.seconds) == (report.step, report.seconds)
    again = train(*load(config, *LIMIT, "train.max_minutes=2"))
    assert (again.step, again.finished) == (report.step, True)
    more = train(*load(config, *LIMIT, "train.max_minutes=3"))
    assert more.step > report.step
    assert more.seconds <= 182


def test_a_real_run_ends_in_time_with_a_whole_checkpoint(tmp_path: Path, toy_target: Path) -> None:
    config = linear_run(tmp_path, toy_target)
    report = train(*load(config, *LIMIT, "train.max_steps=100000", "train.max_minutes=0.05"))
    assert report.finished
    assert 0 < report.step < 100000
    found = checkpoint.find(tmp_path / "run")
    assert found == report.checkpoint
    assert json.loads((found / "state.json").read_text())["step"] == report.step
