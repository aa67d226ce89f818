"""Training in processes of its own: several ranks, and processes that are killed or stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.capture.job import run_capture
from specforge_core.drafts import checkpoint
from specforge_core.errors import CaptureError
from specforge_core.testing import runs
from specforge_core.testing.close import close
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import SECONDS, finish, lines, load, losses
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(config: Path, tmp_path: Path) -> None:
    # 4 samples a step either way; 3 epochs of ragged batches
    common = ("train.max_steps=14", "train.batch_size=1")
    train(*load(config, *common, "train.accumulate=4"))
    two = f"output_dir={tmp_path / 'two'}"
    # in processes that start Python, as everybody's do
    command = ("train", "-c", str(config), "--nproc", "2", *common, "train.accumulate=2", two)
    finish(runs.cli(*command))
    first, *rest = lines(tmp_path / "two")
    assert first["seconds_imports"] > 0
    assert not any("seconds_imports" in row for row in rest)
    # 14 steps of sums over 32 and 260; AdamW's division by small moments widens a difference
    close(
        losses(tmp_path / "two"),
        losses(tmp_path / "run"),
        terms=14 * (32 + 260),
        dtype=torch.float32,
    )
    # and a checkpoint of two ranks goes on as one process
    train(*load(config, *common, "train.accumulate=4", two, "train.max_steps=16"))
    assert len(losses(tmp_path / "two")) == 16


@pytest.mark.slow
def test_replicas_of_shards_give_the_losses_of_one_rank(config: Path, tmp_path: Path) -> None:
    common = ("train.batch_size=1", "train.max_grad_norm=0.5")
    train(*load(config, *common, "train.accumulate=4"))
    want = lines(tmp_path / "run")
    assert all(row["grad_norm"] > 0.5 for row in want)  # so a wrong norm is clipped otherwise
    for ranks, shards in ((2, 1), (4, 2)):
        place = tmp_path / f"{ranks}"
        size = (f"train.accumulate={4 // ranks}", f"train.shard_size={shards}")
        options = (*common, *size, f"output_dir={place}")
        finish(cli("train", "-c", str(config), "--nproc", str(ranks), *options))
        for key in ("loss", "grad_norm"):
            found = [row[key] for row in lines(place)]
            close(found, [row[key] for row in want], terms=6 * (32 + 260), dtype=torch.float32)
    # and their checkpoint goes on as one process
    train(*load(config, *common, "train.accumulate=4", f"output_dir={place}", "train.max_steps=7"))
    assert len(losses(place)) == 7


@pytest.mark.slow
def test_muon_gives_the_same_on_ranks_and_on_replicas_of_shards(
    config: Path, tmp_path: Path, env: Any
) -> None:
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
            return Draft(model=model, shard=(hidden,))
        """,
    )
    common = ("strategy.name=deep", "train.optimizer=muon", "train.batch_size=1")
    train(*load(config, *common, "train.accumulate=4"))
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    for ranks in (2, 4):
        place, sizes = (
            tmp_path / f"{ranks}",
            (f"train.accumulate={4 // ranks}", "train.shard_size=2"),
        )
        options = (*common, *sizes, f"output_dir={place}")
        finish(cli("train", "-c", str(config), "--nproc", str(ranks), *options, env=environment))
        # Newton-Schulz runs in bfloat16, so they agree only to its rounding
        # of updates, of which a loss sees the mean of many: a quarter of one rounding
        found, want = losses(place), losses(tmp_path / "run")
        close(found, want, terms=1, factor=0.25, dtype=torch.bfloat16)


@pytest.mark.slow
def test_metrics_that_hang_on_the_rank_are_refused_on_all(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy(
        "uneven",
        """
        import torch.distributed as dist
        from specforge_core import hookimpl
        from specforge_core.types import StepOutput
        import specforge_linear
        from specforge_linear import specforge_adapter, specforge_config, specforge_draft

        @hookimpl
        def specforge_train_step():
            def step(draft, batch, ctx):
                out = specforge_linear.train_step(draft, batch, ctx)
                metrics = dict(out.metrics)
                if dist.get_rank() == 1:
                    metrics["extra"] = metrics["accuracy"]
                return StepOutput(loss_sum=out.loss_sum, weight=out.weight, metrics=metrics)
            return step
        """,
    )
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    options = ("--nproc", "2", "strategy.name=uneven")
    process = cli("train", "-c", str(config), *options, env=environment)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    text = " ".join((out + err).split())
    assert text.count("specforge-uneven 0.1.0, specforge_train_step: rank 0 has the metrics") == 1
    assert not checkpoint.checkpoints(tmp_path / "run")


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
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, err
    assert "stopped at step" in out
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state.step == lines(tmp_path / "run")[-1]["step"]


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


@pytest.mark.slow
def test_a_thread_that_still_runs_does_not_make_the_end_an_abort(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy(
        "restless",
        """
        import atexit, threading
        import torch
        from specforge_core import hookimpl
        from specforge_linear import (
            specforge_adapter, specforge_config, specforge_draft, specforge_train_step)

        def work():
            values = torch.ones(100)
            while True:  # every addition gives the interpreter's lock back and takes it again
                values + values

        class Restless:
            def __init__(self, output_dir):
                self.output_dir = output_dir

            def start(self, info): ...

            def log(self, step, metrics):
                threading.Thread(target=work, daemon=True).start()
                atexit.register((self.output_dir / "ended").touch)

            def event(self, name, values): ...

            def close(self): ...

        @hookimpl
        def specforge_tracker(run):
            return Restless(run.output_dir)
        """,
    )
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    options = ("strategy.name=restless", "train.max_steps=2", "train.log_every=2")
    # its own end of Python is what this is about
    out = finish(runs.cli("train", "-c", str(config), *options, env=environment))
    assert "finished at step 2/2" in out
    assert (tmp_path / "run" / "ended").exists()  # what was registered is still called


@pytest.mark.slow
def test_all_ranks_hear_that_a_checkpoint_cannot_be_written(config: Path, tmp_path: Path) -> None:
    two = ("train", "-c", str(config), "--nproc", "2", "train.keep=9")
    finish(cli(*two, "train.max_steps=3"))
    (tmp_path / "run" / "checkpoints" / "step-00000006").write_text("in the way")
    out, err = (process := cli(*two)).communicate(timeout=SECONDS)
    assert process.returncode != 0, out
    assert "step-00000006 cannot be written: Not a directory" in err
    assert "The checkpoints before it are whole" in err
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-00000003", "step-00000006"]
    (tmp_path / "run" / "checkpoints" / "step-00000006").unlink()
    finish(cli(*two))
    assert checkpoint.find(tmp_path / "run").name == "step-00000006"


def test_a_sample_that_was_changed_on_the_disk_is_not_trained_on(
    config: Path, tmp_path: Path
) -> None:
    options = (f"data.capture_dir={tmp_path / 'capture'}", "capture.shard_tokens=200")
    run_capture(*load(config, *options))
    path = max((tmp_path / "capture").glob("shard-*"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CaptureError, match=r"the sample of prompt .* is not as written"):
        train(*load(config, *options, "train.max_steps=20"))


UNLIKE = """
    import os
    import torch
    from specforge_core import cpu
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_train_step)

    # bfloat16 wins the race of one rank, and loses the other's
    cpu.has_bfloat16_instructions = lambda path: True
    def seconds(dtype):
        slow = torch.float32 if os.environ.get("RANK", "0") == "0" else torch.bfloat16
        return 2.0 if dtype == slow else 1.0
    cpu._seconds = seconds
    """


@pytest.mark.slow
def test_ranks_compute_in_one_dtype_whatever_each_has_measured(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy("unlike", UNLIKE)
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    options = ("strategy.name=unlike", "train.compute_dtype=auto")
    finish(cli("train", "-c", str(config), "--nproc", "2", *options, env=environment))
    machine = checkpoint.read_state(checkpoint.find(tmp_path / "run")).machine
    assert machine["compute_dtype"] == "bfloat16"
