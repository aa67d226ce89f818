"""Training that is told to stop, or loses a rank, wherever it is."""

from __future__ import annotations

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

from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import MANIFEST
from specforge_core.drafts import checkpoint
from specforge_core.testing import runs
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import SECONDS, finish, lines, load, losses
from specforge_core.train.run import train

from ..processes import Process, alive, children, end, listening, wait
from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
LONG = ("train.max_steps=100000", "train.save_every=100000")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    """A capture of 20 samples."""
    folder = tmp_path_factory.mktemp("captured")
    config = linear_run(folder, toy_target)
    run_capture(*load(config, f"data.capture_dir={folder / 'capture'}"))
    return folder / "capture"


@pytest.fixture
def dead_capture(captured: Path, tmp_path: Path) -> str:
    """A capture whose writer is gone before it is complete."""
    directory = tmp_path / "capture"
    shutil.copytree(captured, directory)
    path = directory / MANIFEST
    text = path.read_text()
    assert '"complete": true' in text
    path.write_text(text.replace('"complete": true', '"complete": false'))
    return f"data.capture_dir={directory}"


def start(
    config: Path, ranks: int, *options: str, env: Any = None, imports: bool = False
) -> Process:
    """Start training; with `imports` in processes that start Python, as everybody's do."""
    begin: Any = runs.cli if imports else cli
    process: Process = begin(
        *("train", "-c", str(config), "--nproc", str(ranks), *options),
        env=env,
    )
    return process


def num_lines(tmp_path: Path) -> int:
    metrics = tmp_path / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize(
    ("ranks", "signals"),
    [
        (1, [signal.SIGTERM]),
        (1, [signal.SIGINT, signal.SIGINT]),
        (2, [signal.SIGINT]),
        (2, [signal.SIGTERM, signal.SIGTERM]),
    ],
)
def test_a_follower_of_a_dead_capture_stops_and_keeps_its_steps(
    config: Path, tmp_path: Path, dead_capture: str, ranks: int, signals: list[int]
) -> None:
    options = (dead_capture, "data.follow=true", *LONG, "train.batch_size=1")
    process = start(config, ranks, *options)
    steps = 20 // (2 * ranks)
    wait(process, lambda: num_lines(tmp_path) == steps)
    status, out, err = end(process, *signals)
    assert status == 128 + signals[0]
    assert out.startswith(f"stopped at step {steps}/100000")
    assert out.endswith(". Start the same command again to go on\n")
    assert err.splitlines()[1:] == []  # the first says on what it trains
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert (state.step, state.position) == (steps, 20)


def test_ranks_that_have_unequal_data_left_stop_at_one_step(
    config: Path, tmp_path: Path, dead_capture: str
) -> None:
    # 20 samples, 3 ranks, 2 a rank and step: after 3 steps two are left, for two of the ranks
    options = (dead_capture, "data.follow=true", *LONG, "train.batch_size=1")
    process = start(config, 3, *options)
    wait(process, lambda: num_lines(tmp_path) == 3)
    status, out, _ = end(process, signal.SIGTERM)
    assert status == 143
    assert "stopped at step 3/100000" in out
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert (state.step, state.position) == (3, 18)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_the_start_ends_with_one_line(config: Path, tmp_path: Path, ranks: int) -> None:
    absent = f"data.capture_dir={tmp_path / 'absent'}"
    process = start(config, ranks, absent, "data.follow=true", imports=ranks == 2)
    wait(process, lambda: (tmp_path / "run" / ".lock").exists())
    status, out, err = end(process, signal.SIGINT)
    assert (status, out) == (130, "")
    assert err.count("stopped by") == 1
    assert err.endswith(
        "stopped by SIGINT: what is finished is kept. Start the same command again to go on\n"
    )
    assert len(err.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_two_signals_save_once_and_the_run_goes_on_as_if_undisturbed(
    config: Path, tmp_path: Path
) -> None:
    options = ("train.save_every=100000", "train.batch_size=1", "train.max_steps=400")
    process = start(config, 2, *options)
    wait(process, lambda: num_lines(tmp_path) > 3)
    status, out, err = end(process, signal.SIGTERM, signal.SIGTERM, apart=0.05)
    assert status == 143
    assert out.count("\n") == 1
    assert "stopped at step" in out
    assert len(err.splitlines()) == 1
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state.step == lines(tmp_path / "run")[-1]["step"]


def test_an_error_of_the_ranks_is_said_as_one_process_says_it(config: Path, tmp_path: Path) -> None:
    absent = f"data.capture_dir={tmp_path / 'absent'}"
    alone, both = start(config, 1, absent), start(config, 2, absent)
    said = [process.communicate(timeout=SECONDS) for process in (alone, both)]
    assert (alone.returncode, both.returncode) == (2, 2)
    (alone_out, alone_err), (both_out, both_err) = said
    assert alone_out == both_out == ""
    # the line before says how many threads a process has
    assert alone_err.splitlines()[1:] == both_err.splitlines()[1:]
    assert len(both_err.splitlines()) == 2
    assert both_err.splitlines()[1].startswith("error: ")


def test_a_killed_rank_ends_the_others_and_is_named_first(config: Path, tmp_path: Path) -> None:
    process = start(config, 2, *LONG)
    wait(process, lambda: num_lines(tmp_path) > 3)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    status, out, err = end(process)
    assert (status, out) == (1, "")
    assert err.splitlines()[1].startswith("error: rank 1 was killed by SIGKILL")
    assert len(err.splitlines()) == 2
    assert not any(map(alive, ranks.values()))


def test_an_error_of_one_rank_is_named_before_what_others_make_of_it(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy(
        "failing",
        """
        import torch.distributed as dist
        from specforge_core import hookimpl
        from specforge_core.errors import RunError
        import specforge_linear
        from specforge_linear import specforge_adapter, specforge_config, specforge_draft

        @hookimpl
        def specforge_train_step():
            def step(draft, batch, ctx):
                if dist.get_rank() == 1 and ctx.step == 2:
                    raise RunError("this rank's own trouble")
                return specforge_linear.train_step(draft, batch, ctx)
            return step
        """,
    )
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    process = start(config, 2, "strategy.name=failing", env=environment)
    wait(process, lambda: num_lines(tmp_path) == 2)
    status, _, err = end(process)
    assert status == 1
    assert len(err.splitlines()) == 2
    assert err.splitlines()[1].startswith("error (rank 1): ")
    assert "this rank's own trouble" in err


def test_ranks_listen_on_the_loopback_interface_only(config: Path, tmp_path: Path) -> None:
    process = start(config, 2, *LONG)
    wait(process, lambda: num_lines(tmp_path) > 1)
    found = [listening(rank) for rank in children(process.pid).values()]
    assert len(found) == 2
    assert all(found)  # they do talk by TCP, so the test sees what there is to see
    assert set.union(*found) <= LOOPBACK
    assert listening(process.pid) == set()
    end(process, signal.SIGTERM)


def test_one_process_listens_on_the_loopback_interface_only(config: Path, tmp_path: Path) -> None:
    process = start(config, 1, *LONG)
    wait(process, lambda: num_lines(tmp_path) > 1)
    assert listening(process.pid) <= LOOPBACK
    end(process, signal.SIGTERM)


def test_torchs_own_launcher_still_works(config: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, "2", "-m", "specforge_core.cli", "train", "-c", str(config)]
    pipe = subprocess.PIPE
    out = finish(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
    assert "finished at step 6/6" in out
    train(*load(config, "train.accumulate=4", f"output_dir={tmp_path / 'alone'}"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


STUCK = """
    import hashlib
    import torch.distributed as dist
    from specforge_core import hookimpl
    import specforge_linear
    from specforge_linear import specforge_adapter, specforge_config, specforge_draft

    @hookimpl
    def specforge_train_step():
        def step(draft, batch, ctx):
            if dist.get_rank() == 1 and ctx.step == 5:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # runs no handler for hours
            return specforge_linear.train_step(draft, batch, ctx)
        return step
    """
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]


def kill_launcher(process: Process, seconds: float) -> None:
    """Kill a launcher, and see that its ranks end by themselves."""
    ranks = children(process.pid)
    assert sorted(ranks) == [0, 1]
    process.kill()
    killed = time.monotonic()
    process.communicate()  # which ends when nobody is left to write
    while any(map(alive, ranks.values())):  # a process closes its files before it is gone
        assert time.monotonic() - killed < seconds
        time.sleep(0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_save_and_end_when_their_launcher_is_killed(
    config: Path, tmp_path: Path, device: str
) -> None:
    process = start(config, 2, *LONG, f"train.device={device}", imports=True)
    wait(process, lambda: num_lines(tmp_path) > 3)
    kill_launcher(process, 20)
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    train_ = state.config["train"]
    assert state.position == 2 * state.step * train_["batch_size"] * train_["accumulate"]
    assert state.step > 3


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_that_wait_for_each_other_end_when_their_launcher_is_killed(
    config: Path, tmp_path: Path, env: Any, device: str
) -> None:
    env.strategy("stuck", STUCK)
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    options = ("strategy.name=stuck", f"train.device={device}")
    process = start(config, 2, *LONG, *options, env=environment)
    wait(process, lambda: num_lines(tmp_path) == 5)
    kill_launcher(process, 40)  # 30 on a machine that does nothing else


SLOW = """
    import time
    from specforge_core import hookimpl
    import specforge_linear
    from specforge_linear import specforge_config, specforge_draft, specforge_train_step

    @hookimpl
    def specforge_adapter(config, target):
        adapter = specforge_linear.specforge_adapter(config, target)
        class Slow:
            spec = adapter.spec
            def __call__(self, capture):
                time.sleep(0.3)
                return adapter(capture)
        return Slow()
    """


def test_a_stopped_capture_says_what_is_stored_and_goes_on(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy("slow", SLOW)
    directory = tmp_path / "capture"
    options = (f"data.capture_dir={directory}", "capture.shard_tokens=100", "strategy.name=slow")
    command = ("capture", "-c", str(config), *options)
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    process = cli(*command, env=environment)
    wait(process, lambda: len(list(directory.glob("shard-*"))) > 1)
    status, out, err = end(process, signal.SIGTERM)
    assert (status, out) == (143, "")
    assert err.startswith("stopped by SIGTERM: ")
    assert f" of 20 samples are in {directory}. Start the same command" in err
    assert err.count("\n") == 1
    assert "20 samples" in finish(cli(*command, env=environment))
