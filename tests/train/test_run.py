"""Training end to end on a toy target, with the linear example as the strategy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.drafts.checkpoint import CHECKSUMS, STATE, checkpoints, find
from specforge_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PluginError,
)
from specforge_core.testing.runs import lines, load, losses
from specforge_core.testing.toy import write_conversations
from specforge_core.train.feed import open_feed, share_of
from specforge_core.train.metrics import Reducer
from specforge_core.train.plan import plan_run
from specforge_core.train.run import train

from ..runs import WIDE, linear_run, weights

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


def test_online_training_lowers_the_loss_and_logs_every_step(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = train(*load(config, "train.max_steps=12"))
    told = re.findall(r"training linear (\d+)/12  loss \d\.\d{3}  ", capsys.readouterr().err)
    assert (told[0], told[-1]) == ("1", "12")
    assert (report.step, report.total_steps) == (12, 12)
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    for key in ("accuracy", "learning_rate", "grad_norm", "tokens_per_second", "seconds_data"):
        assert key in rows[0]
    start = ("seconds_group", "seconds_source", "seconds_target", "seconds_draft")
    assert all(rows[0][key] > 0 for key in start)
    assert not any(key in row for row in rows[1:] for key in start)
    assert "seconds_imports" not in rows[0]  # who calls `train` has imported before
    assert rows[-1]["tokens"] == report.num_tokens


@pytest.mark.slow
def test_offline_training_gives_what_online_training_gives(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*load(config))
    directory = tmp_path / "capture"
    offline = (f"data.capture_dir={directory}", f"output_dir={tmp_path / 'offline'}")
    run_capture(*load(config, *offline))
    train(*load(config, *offline))
    assert losses(tmp_path / "offline") == losses(tmp_path / "run")

    def told(*overrides: str) -> str:
        run, strategy = load(config, *offline, *overrides)
        capsys.readouterr()
        open_feed(run, strategy, share_of(run, 0, 1)).close()
        return str(capsys.readouterr().err)

    assert told() == told("data.train=[]") == ""
    other = write_conversations(tmp_path / "other.jsonl", 13)
    for override in (f"data.train=[{other}]", "data.limit=7"):
        assert "is trained on, and data.train, data.limit, data.mix or data." in told(override)
    assert "2048 tokens, and data.max_length=99 of them are trained on" in told(
        "data.max_length=99"
    )
    gone = told("data.train=[gone.jsonl]")
    assert "is trained on, without data.train: data file 'gone.jsonl' does not exist" in gone
    # of sources that another package reads
    CaptureManifest.read(directory).model_copy(update={"data": None}).write(directory)
    assert told("data.train=[theirs]") == ""


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(config: Path, tmp_path: Path) -> None:
    # 11 steps cross an epoch of 20 samples at 4 a step
    full = ("train.max_steps=11", "train.save_every=4", "train.keep=9")
    train(*load(config, *full))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for step in (8, 11):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    train(*load(config, *full, f"output_dir={again}"))
    assert losses(again) == losses(tmp_path / "run")
    ours, theirs = weights(again), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_does_nothing_more(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    before = losses(tmp_path / "run")
    report = train(*load(config))
    assert report.step == 6
    assert losses(tmp_path / "run") == before


def test_only_the_newest_checkpoints_are_kept(config: Path, tmp_path: Path) -> None:
    train(*load(config, "train.save_every=1", "train.keep=2"))
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == ["step-00000005", "step-00000006"]


@pytest.mark.slow
def test_a_checkpoint_of_another_strategy_or_shape_is_refused(
    config: Path, tmp_path: Path, env: Any
) -> None:
    train(*load(config))
    state = find(tmp_path / "run") / STATE
    state.with_name(CHECKSUMS).unlink()
    other = json.loads(state.read_text()) | {"strategy": "another"}
    kept = state.read_text()
    state.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="strategy 'another', this run is 'linear'"):
        train(*load(config))
    state.write_text(kept)
    env.strategy(
        "wide",
        WIDE,
    )
    state.write_text(json.dumps(json.loads(kept) | {"strategy": "wide"}))
    with pytest.raises(CheckpointError, match=r"model\.weight has shape \[260, 32\] in it"):
        train(*load(config, "strategy.name=wide"))


def test_nothing_to_train_on_is_an_error(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"give data\.train=\[FILE\.jsonl\]"):
        train(*load(config, "data.train=[]"))


def test_data_of_which_nothing_can_be_trained_on_is_an_error(config: Path, env: Any) -> None:
    env.strategy(
        "picky",
        """
        from specforge_core import hookimpl
        from specforge_linear import (
            specforge_adapter, specforge_config, specforge_draft, specforge_train_step)
        @hookimpl
        def specforge_transform():
            return lambda sample, generator: None
        """,
    )
    with pytest.raises(DataError, match="none of 20 samples can be trained on"):
        train(*load(config, "strategy.name=picky"))


STEP = """
    import torch
    from specforge_core import hookimpl
    from specforge_core.types import Ratio, StepOutput
    import specforge_linear
    from specforge_linear import specforge_adapter, specforge_config, specforge_draft
    @hookimpl
    def specforge_train_step():
        def step(draft, batch, ctx):
            out = specforge_linear.train_step(draft, batch, ctx)
            loss, weight, metrics = out.loss_sum, out.weight, dict(out.metrics)
            CHANGE
            return StepOutput(loss_sum=loss, weight=weight, metrics=metrics)
        return step
    """


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            'metrics["loss"] = metrics["accuracy"]',
            PluginError,
            "specforge-odd 0.1.0, specforge_train_step: the metric name 'loss' is the core's own",
        ),
        (
            "metrics.pop('accuracy') if ctx.step else None",
            PluginError,
            "specforge-odd 0.1.0, specforge_train_step: its metrics were .* Their names must not",
        ),
        ("return loss", PluginError, "specforge_train_step: returned Tensor, expected StepOutput"),
        ("metrics['x']", PluginError, "specforge-odd 0.1.0, specforge_train_step: KeyError: 'x'"),
    ],
)
def test_a_step_that_is_wrong_ends_the_run_before_its_weights_are_saved(
    config: Path, tmp_path: Path, env: Any, change: str, error: type[Exception], message: str
) -> None:
    env.strategy("odd", STEP.replace("CHANGE", change))
    with pytest.raises(error, match=message):
        train(*load(config, "strategy.name=odd", "train.save_every=1", "train.accumulate=1"))
    found = checkpoints(tmp_path / "run")
    assert len(found) == ("ctx.step" in change)
    assert all(values.isfinite().all() for path in found for values in weights(path).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=sgd", "train.optimizer 'sgd' is not provided by any installed plugin"),
        ("train.schedule=step", "train.schedule 'step' is not provided by any installed plugin"),
    ],
)
def test_an_optimizer_or_schedule_that_nobody_provides_is_an_error(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        train(*load(config, override))


def test_a_step_in_which_nothing_is_supervised_changes_nothing(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy("odd", STEP.replace("CHANGE", "loss, weight = loss * 0, weight * 0"))
    train(*load(config, "strategy.name=odd", "train.save_every=1", "train.keep=9"))
    first, *_, last = checkpoints(tmp_path / "run")
    one, other = weights(first), weights(last)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("model."))


def test_the_plan_says_what_would_happen_and_does_nothing(config: Path, tmp_path: Path) -> None:
    run, strategy = load(config)
    plan = yaml.safe_load(plan_run(run, strategy, 2))["plan"]
    assert plan["strategy"] == "specforge-linear 0.2.0"
    assert plan["samples_per_step"] == 8
    assert plan["captures"] == {"layers": [4], "final": "none"}
    assert not (tmp_path / "run").exists()


def test_a_signal_while_ranks_agree_is_not_lost(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce = Reducer.reduce

    def interrupted(self: Reducer, *arguments: Any) -> Any:
        found = reduce(self, *arguments)
        calls.append(True)
        if len(calls) == 2:  # in the first step there is nothing to keep
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    calls: list[bool] = []
    monkeypatch.setattr(Reducer, "reduce", interrupted)
    assert train(*load(config)).step in (2, 3)  # 2 where the third batch is not ready
