"""Training end to end on a toy target, with the linear example as the strategy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from specforge_core.capture.worker import run_capture
from specforge_core.config import RunConfig, load_config
from specforge_core.errors import CheckpointError, ConfigError, DataError, RunError
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import write_conversations
from specforge_core.train import checkpoint
from specforge_core.train.plan import plan_run
from specforge_core.train.run import train

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    """A run of 6 steps over 20 ragged conversations, in float32."""
    data = write_conversations(tmp_path / "train.jsonl", 20)
    raw: dict[str, Any] = {
        "target": {"path": str(toy_target), "dtype": "float32", "batch_tokens": 256},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)]},
        "capture": {"window": 4},
        "output_dir": str(tmp_path / "run"),
        "train": {
            "max_steps": 6,
            "batch_size": 2,
            "accumulate": 2,
            "learning_rate": 0.05,
            "log_every": 1,
            "save_every": 3,
            "device": "cpu",
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load(config: Path, *overrides: str) -> tuple[RunConfig, Strategy]:
    return load_config(config, overrides)


def lines(output_dir: Path) -> list[dict[str, Any]]:
    text = (output_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [row["loss"] for row in lines(output_dir)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.find(path).glob("*.safetensors")):
        found |= load_file(file)
    return found


def cli(*arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "specforge_core.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def test_online_training_lowers_the_loss_and_logs_every_step(config: Path, tmp_path: Path) -> None:
    report = train(*load(config, "train.max_steps=12"))
    assert (report.step, report.total_steps) == (12, 12)
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    for key in ("accuracy", "learning_rate", "grad_norm", "tokens_per_second", "seconds_data"):
        assert key in rows[0]
    assert rows[-1]["tokens"] == report.num_tokens


def test_offline_training_gives_what_online_training_gives(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    directory = tmp_path / "capture"
    offline = (f"data.capture_dir={directory}", f"output_dir={tmp_path / 'offline'}")
    run_capture(*load(config, *offline))
    train(*load(config, *offline))
    assert losses(tmp_path / "offline") == losses(tmp_path / "run")


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
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "run")]
    assert names == ["step-00000005", "step-00000006"]


def test_a_checkpoint_of_another_strategy_or_shape_is_refused(
    config: Path, tmp_path: Path, env: Any
) -> None:
    train(*load(config))
    state = checkpoint.find(tmp_path / "run") / checkpoint.STATE
    other = json.loads(state.read_text()) | {"strategy": "another"}
    kept = state.read_text()
    state.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="strategy 'another', this run is 'linear'"):
        train(*load(config))
    state.write_text(kept)
    env.strategy(
        "wide",
        """
        from specforge_core import hookimpl
        from specforge_core.types import Draft
        from specforge_linear import (
            Head, specforge_adapter, specforge_config, specforge_train_step)
        @hookimpl
        def specforge_draft(target):
            return Draft(Head(target.hidden_size, target.vocab_size + 1))
        """,
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
            return lambda sample: None
        """,
    )
    with pytest.raises(DataError, match="none of 20 samples can be trained on"):
        train(*load(config, "strategy.name=picky"))


def test_a_loss_that_is_not_finite_stops_the_run(config: Path, env: Any) -> None:
    env.strategy(
        "notanumber",
        """
        from specforge_core import hookimpl
        from specforge_core.types import StepOutput
        import specforge_linear
        from specforge_linear import specforge_adapter, specforge_config, specforge_draft
        @hookimpl
        def specforge_train_step():
            def step(draft, batch, ctx):
                out = specforge_linear.train_step(draft, batch, ctx)
                return StepOutput(out.loss_sum * float("nan"), out.weight, out.metrics)
            return step
        """,
    )
    with pytest.raises(RunError, match="the loss of step 1 is nan"):
        train(*load(config, "strategy.name=notanumber"))


def test_the_plan_says_what_would_happen_and_does_nothing(config: Path, tmp_path: Path) -> None:
    run, strategy = load(config)
    plan = yaml.safe_load(plan_run(run, strategy, 2))["plan"]
    assert plan["strategy"] == "specforge-linear 0.1.0"
    assert plan["samples_per_step"] == 8
    assert plan["captures"] == {"layers": [4], "final": "none"}
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(config: Path, tmp_path: Path) -> None:
    # 4 samples a step either way; 3 epochs of ragged batches
    common = ("train.max_steps=14", "train.batch_size=1")
    train(*load(config, *common, "train.accumulate=4"))
    two = f"output_dir={tmp_path / 'two'}"
    finish(cli("train", "-c", str(config), "--nproc", "2", *common, "train.accumulate=2", two))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=2e-5)
    # and a checkpoint of two ranks goes on as one process
    train(*load(config, *common, "train.accumulate=4", two, "train.max_steps=16"))
    assert len(losses(tmp_path / "two")) == 16


@pytest.mark.slow
def test_muon_gives_the_same_on_two_ranks(config: Path, tmp_path: Path, env: Any) -> None:
    env.strategy(
        "deep",
        """
        from specforge_core import hookimpl
        from specforge_core.types import Draft
        from specforge_linear import (
            Head, specforge_adapter, specforge_config, specforge_train_step)
        from torch import nn
        @hookimpl
        def specforge_draft(target):
            hidden = Head(target.hidden_size, target.hidden_size)
            model = nn.Sequential(hidden, nn.SiLU(), Head(target.hidden_size, target.vocab_size))
            return Draft(model, (hidden,))
        """,
    )
    common = ("strategy.name=deep", "train.optimizer=muon", "train.batch_size=1")
    train(*load(config, *common, "train.accumulate=4"))
    two = f"output_dir={tmp_path / 'two'}"
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    finish(
        cli(
            *("train", "-c", str(config), "--nproc", "2", *common, "train.accumulate=2", two),
            env=environment,
        )
    )
    # Newton-Schulz runs in bfloat16, so the two agree only to its rounding
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=2e-3)


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_saved(config: Path, tmp_path: Path) -> None:
    steps = ("train.max_steps=60", "train.save_every=5")
    process = cli("train", "-c", str(config), *steps)
    while len(checkpoint.checkpoints(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(cli("train", "-c", str(config), *steps))
    train(*load(config, *steps, f"output_dir={tmp_path / 'whole'}"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_exits(config: Path, tmp_path: Path) -> None:
    process = cli("train", "-c", str(config), "train.max_steps=100000", "train.save_every=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert "stopped at step" in out
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state.step == lines(tmp_path / "run")[-1]["step"]


def test_a_signal_while_ranks_agree_is_not_lost(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specforge_core.train import metrics

    reduce = metrics.reduce

    def interrupted(*arguments: Any) -> Any:
        found = reduce(*arguments)
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    sent: list[bool] = []
    monkeypatch.setattr(metrics, "reduce", interrupted)
    assert train(*load(config)).step == 2


@pytest.mark.slow
def test_training_while_another_process_captures_gives_the_same(
    config: Path, tmp_path: Path
) -> None:
    directory = f"data.capture_dir={tmp_path / 'capture'}"
    small = "capture.shard_tokens=100"
    follower = cli(
        *("train", "-c", str(config), directory, "data.follow=true"),
        *(f"output_dir={tmp_path / 'followed'}",),
    )
    finish(cli("capture", "-c", str(config), directory, small))
    finish(follower)
    train(*load(config, directory))
    assert losses(tmp_path / "followed") == losses(tmp_path / "run")
