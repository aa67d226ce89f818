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
from specforge_core.types import Batch, Draft, StepContext, StepOutput

from ..runs import linear_run

linear = pytest.importorskip("specforge_linear", reason="the linear example is not installed")

LIMIT = ("train.max_steps=1000", "train.schedule=wsd", "train.save_every=1000")


class Clock:
    """Each look at the clock takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    perf_counter = staticmethod(time.perf_counter)


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far each call of the train step was told to be."""
    seen: list[float] = []
    step = linear.train_step

    def noting(draft: Draft, batch: Batch, ctx: StepContext) -> StepOutput:
        seen.append(ctx.progress)
        output: StepOutput = step(draft, batch, ctx)
        return output

    monkeypatch.setattr(linear, "train_step", noting)
    return seen


@pytest.mark.slow
def test_the_schedule_and_the_steps_progress_end_with_the_time(
    tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch, progress: list[float]
) -> None:
    monkeypatch.setattr(trainer, "time", Clock())
    config = linear_run(tmp_path, toy_target)
    report = train(*load(config, *LIMIT, "train.max_minutes=1"))
    assert report.finished
    assert 10 < report.step <= 30  # two or more looks at the clock a step
    assert report.seconds <= 62
    rates = [row["learning_rate"] for row in lines(tmp_path / "run")]
    assert rates[len(rates) // 2] == pytest.approx(0.05)
    assert rates[-1] < 0.2 * 0.05
    assert (progress[0], progress) == (0.0, sorted(progress))
    assert 0.95 < progress[-1] <= 1  # though of its 1000 steps few are done
    # the time before counts: nothing is left for a resumed run
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert (state.step, state.seconds) == (report.step, report.seconds)
    again = train(*load(config, *LIMIT, "train.max_minutes=1"))
    assert (again.step, again.finished) == (report.step, True)
    more = train(*load(config, *LIMIT, "train.max_minutes=1.5"))
    assert more.step > report.step
    assert more.seconds <= 92


def test_a_run_of_steps_or_epochs_is_told_how_far_it_is(
    tmp_path: Path, toy_target: Path, progress: list[float]
) -> None:
    config = linear_run(tmp_path, toy_target)  # an epoch is 5 steps of two batches
    wanted = [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    for name, ends in (("steps", "train.max_steps=5"), ("epoch", "train.max_steps=null")):
        train(*load(config, ends, "train.epochs=1", f"output_dir={tmp_path / name}"))
        assert progress == wanted
        progress.clear()


@pytest.mark.slow
def test_a_real_run_ends_in_time_with_a_whole_checkpoint(tmp_path: Path, toy_target: Path) -> None:
    config = linear_run(tmp_path, toy_target)
    report = train(*load(config, *LIMIT, "train.max_steps=100000", "train.max_minutes=0.02"))
    assert report.finished
    assert 0 < report.step < 100000
    found = checkpoint.find(tmp_path / "run")
    assert found == report.checkpoint
    assert json.loads((found / "state.json").read_text())["step"] == report.step
