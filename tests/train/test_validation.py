"""What is held out: which conversations, never trained on, the same numbers on any ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_core.batches import loader
from specforge_core.capture.job import Job, run_capture
from specforge_core.config import DataConfig
from specforge_core.data.split import SPACE, Side, one_sided
from specforge_core.errors import CaptureError, ConfigError, DataError
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, lines, load
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train
from specforge_core.train.validation import Validation

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


def validations(output_dir: Path) -> list[dict[str, Any]]:
    return [row for row in lines(output_dir) if "validation/loss" in row]


def rows(config: Path, *overrides: str, validation: bool = False) -> list[tuple[int, ...]]:
    prompts = Job.open(*load(config, *overrides)).prompts(validation=validation)
    return [tuple(prompt.input_ids.tolist()) for prompt in prompts]


def test_a_part_is_held_out_by_question_and_the_rest_is_trained_on(
    config: Path, tmp_path: Path
) -> None:
    everything = rows(config)
    part = "data.validation=0.3"
    trained, held_out = rows(config, part), rows(config, part, validation=True)
    assert 0 < len(held_out) < 12
    assert sorted(trained + held_out) == sorted(everything)
    assert not set(trained) & set(held_out)
    # another order, and more rows, change no side; nor does another answer to the question
    path = tmp_path / "train.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    again = [json.loads(json.dumps(row)) for row in found]
    for row in again:
        row["messages"][-1]["content"] += " more"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(found + again)))
    assert len(rows(config, part, validation=True)) == 2 * len(held_out)
    assert set(held_out) < set(rows(config, part, validation=True))


def test_the_first_conversations_are_the_same_ones_for_both_sides(config: Path) -> None:
    first = ("data.limit=8",)
    part = (*first, "data.validation=0.3")
    both = rows(config, *part) + rows(config, *part, validation=True)
    assert sorted(both) == sorted(rows(config, *first))


def test_files_are_validated_on_and_none_of_their_questions_is_trained_on(
    config: Path, tmp_path: Path
) -> None:
    everything = rows(config)
    lines_ = (tmp_path / "train.jsonl").read_text().splitlines()
    other = tmp_path / "held-out.jsonl"
    fresh = write_conversations(tmp_path / "fresh.jsonl", 3, seed=5).read_text()
    other.write_text("\n".join(lines_[4:6]) + "\n" + fresh)
    files = f"data.validation={other}"
    assert rows(config, files, validation=True)[:2] == everything[4:6]
    assert len(rows(config, files, validation=True)) == 5
    assert rows(config, files) == everything[:4] + everything[6:]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.validation=0", ConfigError, r"more than 0 \(to hold out nothing: \[\]\)"),
        ("data.validation=1.5", ConfigError, "more than 0 and less than 1"),
        ("data.validation=true", ConfigError, "Input should be a number"),
        ("data.validation=1e-9", DataError, "holds out none of 20 conversations"),
        ("data.validation=0.999999", DataError, "all 20 conversations of data.train are held out"),
        ("data.validation=[nowhere.jsonl]", DataError, "nowhere.jsonl"),
        ("train.validate_every=2", ConfigError, "train.validate_every needs data.validation"),
    ],
)
def test_what_holds_out_nothing_or_all_is_an_error(
    config: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(*load(config, override))


def test_the_part_that_is_advised_holds_out_one(config: Path) -> None:
    with pytest.raises(DataError) as error:
        rows(config, "data.validation=1e-9", validation=True)
    found = re.search(r"Try: (data\.validation=([0-9.]+))", str(error.value))
    assert found is not None
    assert rows(config, found[1], validation=True)
    if (less := float(found[2]) - 0.01) > 0:
        with pytest.raises(DataError, match="holds out none"):
            rows(config, f"data.validation={less:.2f}", validation=True)


def test_no_part_is_advised_where_that_would_be_all() -> None:
    side = Side(held_out=True, others=1, nearest=SPACE - 1)
    assert side.least is None
    told = str(one_sided(side, DataConfig(validation=0.5)))
    assert "none of 1 conversations. Try: a file of its own" in told


@pytest.mark.slow
def test_validating_changes_nothing_of_the_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on the other side alone has the same losses, and each validation is of its moment."""
    part = "data.validation=0.3"
    every = "train.validate_every=2", "train.save_every=4", "train.keep_best=validation_loss"
    train(*load(config, part, *every))
    found = validations(tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    for row in found:
        loss, length = row["validation/loss"], row["validation/acceptance_length"]
        told = f"step {row['step']}: validation loss {loss:.4g}, simulated acceptance length"
        assert f"{told} {length:.4g}, the best so far" in said
    assert [row["step"] for row in found] == [2, 4, 6]
    assert found[0]["validation/loss"] > found[1]["validation/loss"] > found[2]["validation/loss"]
    assert set(found[0]) == {
        "step",
        "validation/loss",
        "validation/accuracy",
        "validation/acceptance_length",
    }
    train(*load(config, part, "train.validate_every=99", f"output_dir={tmp_path / 'other'}"))
    ours = [row["loss"] for row in lines(tmp_path / "run") if "loss" in row]
    theirs = [row["loss"] for row in lines(tmp_path / "other") if "loss" in row]
    assert ours == theirs
    assert validations(tmp_path / "other")[-1] == found[-1]  # the last step is always measured


@pytest.mark.slow
def test_offline_it_is_captured_too_and_gives_the_same(config: Path, tmp_path: Path) -> None:
    part = ("data.validation=0.3", "train.validate_every=3")
    train(*load(config, *part))
    offline = (*part, f"data.capture_dir={tmp_path / 'c'}", f"output_dir={tmp_path / 'offline'}")
    with pytest.raises(CaptureError):
        train(*load(config, *offline))
    run_capture(*load(config, *offline))
    train(*load(config, *offline))
    assert lines(tmp_path / "offline")[-1].keys() == lines(tmp_path / "run")[-1].keys()
    for ours, theirs in zip(
        validations(tmp_path / "offline"), validations(tmp_path / "run"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_capture_without_it_is_refused(config: Path, tmp_path: Path) -> None:
    offline = f"data.capture_dir={tmp_path / 'c'}"
    run_capture(*load(config, offline))
    with pytest.raises(CaptureError, match=r"data\.validation is not captured"):
        train(*load(config, offline, "data.validation=0.3"))
    # what is in it would be trained on
    with pytest.raises(CaptureError, match="was begun with other prompts"):
        run_capture(*load(config, offline, "data.validation=0.3"))
    with pytest.raises(CaptureError, match=r"data\.validation is not captured"):
        train(*load(config, offline, "data.validation=0.3"))


@pytest.mark.slow
def test_a_resumed_run_has_every_validation_once(config: Path, tmp_path: Path) -> None:
    part = ("data.validation=0.3", "train.validate_every=1", "train.log_every=5")
    train(*load(config, *part, "train.max_steps=4"))
    train(*load(config, *part, "train.max_steps=6"))
    found = validations(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    train(*load(config, *part, f"output_dir={tmp_path / 'whole'}"))
    # the schedule of a run of 4 steps is another: the numbers differ, the steps do not
    assert [row["step"] for row in validations(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(config: Path, tmp_path: Path) -> None:
    part = ["data.validation=0.3", "train.validate_every=1", "train.learning_rate=1e-9"]
    part += [f"eval.prompts.toy={tmp_path / 'train.jsonl'}", "train.eval_every=1"]
    part += ["eval.limit=2", "eval.max_new_tokens=8", "train.keep_best=acceptance"]
    train(*load(config, *part, "train.max_steps=1"))
    other = f"output_dir={tmp_path / 'two'}"
    finish(cli("train", "-c", str(config), "--nproc", "2", other, *part, "train.max_steps=1"))
    one, two = validations(tmp_path / "run"), validations(tmp_path / "two")
    assert len(one) == len(two) == 1
    # counts are equal, sums up to rounding: the target's batches are others
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    # the first rank decodes with the parts of both
    lengths = [
        [row["acceptance/length"] for row in lines(tmp_path / name) if "acceptance/length" in row]
        for name in ("run", "two")
    ]
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == 1


def test_a_stop_does_not_wait_for_the_states_of_a_validation(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for those that the training captures ahead: both windows would take 20 s."""
    run, capture = Validation.run, loader.capture_in_order
    asked: list[float] = []

    def stop_soon() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def slow(*how: Any) -> Iterator[tuple[int, Any]]:
        for one in capture(*how):
            time.sleep(1.0 if timers else 0)
            yield one

    def watched(self: Validation, *arguments: int) -> dict[str, float] | None:
        timers.append(threading.Timer(0.7, stop_soon))
        timers[-1].start()
        return run(self, *arguments)

    timers: list[threading.Timer] = []
    monkeypatch.setattr(loader, "capture_in_order", slow)
    monkeypatch.setattr(Validation, "run", watched)
    settings = ("capture.window=20", "data.validation=0.5", "train.validate_every=1")
    report = train(*load(config, *settings, "train.max_steps=9", "train.save_every=100"))
    assert time.monotonic() - asked[0] < 15
    assert (report.step, report.finished, len(timers)) == (1, False, 1)
    assert not [row for row in lines(config.parent / "run") if "validation/loss" in row]
