"""Acceptance while training: which checkpoint is the best, how a run ends early, what is kept."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from specforge_core.capture.job import run_capture
from specforge_core.drafts.checkpoint import checkpoints, find, read_state
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.evaluate.beside import Beside
from specforge_core.evaluate.live import Live
from specforge_core.evaluate.run import evaluate
from specforge_core.testing import forked
from specforge_core.testing.predictable import save_predictable_target, write_own_answers
from specforge_core.testing.runs import finish, lines, load, write_run
from specforge_core.train.run import train
from specforge_core.train.validation import Validation

from .peaking import PEAK

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture(scope="module")
def predictable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictable")
    save_predictable_target(path)
    write_own_answers(path, path / "own.jsonl", 12, length=24)
    return path


@pytest.fixture
def config(tmp_path: Path, predictable: Path, env: Any) -> Path:
    """A run of 8 steps whose draft is at its best after 4."""
    env.strategy("peak", PEAK)
    return write_run(
        tmp_path,
        predictable,
        conversations=1,
        strategy={"name": "peak"},
        data={"train": [str(predictable / "own.jsonl")]},
        train={
            "max_steps": 8,
            "batch_size": 4,
            "learning_rate": 0.03,
            "max_grad_norm": 1e6,
            "schedule": "constant",
            "warmup_ratio": 0,
            "save_every": 3,
            "keep": 1,
        },
        eval={
            "prompts": {"own": str(predictable / "own.jsonl")},
            "limit": 3,
            "max_new_tokens": 24,
        },
    )


BY_ACCEPTANCE = ("train.eval_every=2", "train.keep_best=acceptance")
BY_LOSS = ("train.validate_every=2", "data.validation=0.3", "train.keep_best=validation_loss")


def measured(output_dir: Path, name: str = "acceptance/length") -> dict[int, float]:
    return {row["step"]: row[name] for row in lines(output_dir) if name in row}


def steps(output_dir: Path) -> list[int]:
    return [read_state(path).step for path in checkpoints(output_dir)]


@pytest.mark.slow
def test_the_checkpoint_whose_acceptance_is_best_is_kept(config: Path, tmp_path: Path) -> None:
    train(*load(config, *BY_ACCEPTANCE))
    out = tmp_path / "run"
    found = measured(out)
    assert list(found) == [2, 4, 6, 8]
    assert found[2] < found[4] > found[8]
    best = 4
    assert steps(out) == [best, 8]
    assert (out / "best").readlink() == Path(f"checkpoints/step-{best:08d}")
    assert (out / "latest").readlink() == Path("checkpoints/step-00000008")
    assert find(Path(f"{out}@best")) == out / f"checkpoints/step-{best:08d}"
    assert (out / "eval" / "progress.png").stat().st_size > 1000
    # what was measured in the training is what `eval` finds in that checkpoint
    run, strategy = load(config, "eval.compare=false")
    report = evaluate(run, strategy, restore(run, strategy, Path(f"{out}@best")).draft)
    assert report.acceptance_length == pytest.approx(found[best])
    written = export_checkpoint(Path(f"{out}@best"), "hf", tmp_path / "export", force=False)
    assert json.loads((written / "provenance.json").read_text())["step"] == best


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(config: Path, tmp_path: Path) -> None:
    train(*load(config, *BY_ACCEPTANCE, "train.max_steps=3"))
    other = f"output_dir={tmp_path / 'other'}"
    train(*load(config, "train.max_steps=3", other))
    ours = [row["loss"] for row in lines(tmp_path / "run") if "loss" in row]
    assert ours == [row["loss"] for row in lines(tmp_path / "other")]
    assert not (tmp_path / "other" / "eval").exists()


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(config: Path, tmp_path: Path) -> None:
    report = train(*load(config, *BY_LOSS, "train.patience=1"))
    found = measured(tmp_path / "run", "validation/loss")
    best = min(found, key=lambda step: (found[step], step))
    assert report.finished
    assert (best, report.step) == (4, 6)
    assert steps(tmp_path / "run") == [4, 6]
    # started again it stays as it is; with more patience it goes on, and the best one stays
    assert train(*load(config, *BY_LOSS, "train.patience=1")).step == report.step
    assert train(*load(config, *BY_LOSS, "train.patience=9")).step == 8
    for goes_on in ((), ("train.keep=1",)):  # without keep_best, too
        train(*load(config, *BY_LOSS[:2], *goes_on))
        assert steps(tmp_path / "run") == [best, 8]
        assert find(Path(f"{tmp_path / 'run'}@best")).name == f"step-{best:08d}"


@pytest.mark.slow
def test_a_resumed_run_keeps_the_best_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    measure = Live.measure
    calls: list[int] = []

    def stopping(self: Live, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # at step 6, when it already gets worse
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Live, "measure", stopping)
        assert not train(*load(config, *BY_ACCEPTANCE)).finished
    kept = find(Path(f"{out}@best"))
    train(*load(config, *BY_ACCEPTANCE))
    assert read_state(kept).step == 4
    assert find(Path(f"{out}@best")) == kept
    assert steps(out) == [4, 8]
    found = measured(out)
    assert list(found) == [2, 4, 6, 8]  # the one that was cut off is made up for
    assert found[4] == max(found.values())


@pytest.mark.slow
def test_validations_that_a_signal_cut_off_are_made_up_for_with_the_weights_of_their_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle and behind the last step, when nothing is trained any more."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    run, count = Validation.run, iter(range(100))

    def stopping(self: Validation, step: int, total_steps: int) -> dict[str, float] | None:
        if next(count) in (1, 4):  # at step 4, and at step 8
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, step, total_steps)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", stopping)
        assert train(*load(config, *BY_LOSS)).step == 4
        assert list(measured(out, "validation/loss")) == [2]
        assert train(*load(config, *BY_LOSS)).step == 8
        assert list(measured(out, "validation/loss")) == [2, 4, 6]
    train(*load(config, *BY_LOSS))
    train(*load(config, *BY_LOSS, f"output_dir={whole}"))
    assert measured(out, "validation/loss") == measured(whole, "validation/loss")
    assert find(Path(f"{out}@best")).name == find(Path(f"{whole}@best")).name == "step-00000004"


@pytest.mark.slow
def test_an_evaluation_that_takes_too_long_is_given_up(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def draw(*_: object) -> bool:
        raise ImportError("no matplotlib")

    # a picture that cannot be drawn ends no run either
    monkeypatch.setattr("specforge_core.train.milestones.plot_progress", draw)
    options = (*BY_ACCEPTANCE, "train.max_steps=2", "train.eval_seconds=1e-6")
    assert train(*load(config, *options)).step == 2
    assert measured(tmp_path / "run") == {}
    said = capsys.readouterr().err
    assert "acceptance of step 2 was not measured: it took longer than" in said
    assert "warning: eval/progress.png: ImportError: no matplotlib" in said
    more = load(config, *options, "train.max_steps=3", "train.eval_every=2")
    train(*more)  # goes on behind step 2, and does not try again
    said = capsys.readouterr().err
    assert "acceptance of step 2" not in said
    assert "acceptance of step 3 was not measured: it took longer than" in said


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("eval.prompts={}", "train.eval_every=2"), ConfigError, "train.eval_every needs eval.pro"),
        (("train.keep_best=acceptance",), ConfigError, "needs train.eval_every"),
        (("train.keep_best=validation_loss",), ConfigError, "needs data.validation"),
        (("train.patience=2",), ConfigError, "counts measurements for train.keep_best"),
        (("train.keep_best=loss",), ConfigError, "'acceptance' or 'validation_loss'"),
        (("eval.prompts.own=no.jsonl", "train.eval_every=2"), ConfigError, "does not exist"),
        (("eval.device=cuda:9", "train.eval_every=2"), ConfigError, "eval.device 'cuda:9' cannot"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_first_step(
    config: Path, tmp_path: Path, overrides: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(*load(config, *overrides))
    assert not checkpoints(tmp_path / "run")


def test_a_best_one_that_is_not_there_is_an_error(config: Path, tmp_path: Path) -> None:
    train(*load(config, "train.max_steps=1"))
    with pytest.raises(CheckpointError, match=r"no link .* Train with train\.keep_best"):
        find(Path(f"{tmp_path / 'run'}@best"))
    assert find(Path(f"{tmp_path / 'run'}@latest")) == find(tmp_path / "run")
    (tmp_path / "run" / "best").mkdir()
    with pytest.raises(CheckpointError, match="somebody's own"):
        find(Path(f"{tmp_path / 'run'}@best"))


@pytest.mark.slow
def test_beside_the_training_a_killed_evaluation_costs_its_own_number_only(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Offline, in processes of their own: the first is killed, the others tell of their steps."""
    start = Beside.start

    def killing(self: Beside, step: int, checkpoint: Path) -> None:
        start(self, step, checkpoint)
        assert self._process is not None
        if step == 2:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        while self._process.poll() is None:  # steps are much faster here than a process starts
            time.sleep(0.05)

    monkeypatch.setattr(Beside, "start", killing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site-packages"))
    offline = (*BY_ACCEPTANCE, f"data.capture_dir={tmp_path / 'c'}", "train.max_steps=6")
    run_capture(*load(config, *offline))
    out = tmp_path / "run"
    train(*load(config, *offline))
    found = measured(out)
    assert list(found) == [4, 6]
    assert "acceptance of step 2 was not measured: its process ended with SIGKILL" in (
        capsys.readouterr().err
    )
    best = max(found, key=lambda step: (found[step], -step))
    assert find(Path(f"{out}@best")).name == f"step-{best:08d}"
    report = json.loads((out / "eval" / f"step-{best:08d}.json").read_text())
    assert report["acceptance_length"] == found[best]


def evaluating(out: Path) -> list[int]:
    """Return the processes that evaluate a checkpoint of a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"specforge_core.evaluate.detached" in words and os.fsencode(out) in words[-3]:
                found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_a_training_that_is_killed_takes_its_evaluation_along_and_makes_up_for_it(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = (*BY_ACCEPTANCE, "strategy.name=linear", "eval.device=cpu", "train.max_steps=4")
    command = ("train", "-c", str(config), *options)
    process = forked.cli(*command)
    until = time.monotonic() + 120
    while not evaluating(out) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    while evaluating(out) and time.monotonic() < until:
        time.sleep(0.02)
    assert time.monotonic() < until
    assert measured(out) == {}
    # how far the training came beside it depends on the machine; of step 3 nothing is measured
    owed = max(step for step in steps(out) if step % 2 == 0)
    finish(forked.cli(*command))
    assert measured(out).keys() >= {owed, 4}
    found = measured(out)
    best = max(found, key=lambda step: (found[step], -step))
    assert find(Path(f"{out}@best")).name == f"step-{best:08d}"
