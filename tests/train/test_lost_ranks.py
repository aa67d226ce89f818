"""Ranks that fail, are killed, or lose their launcher: all end, and one message says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.drafts import checkpoint
from specforge_core.testing.runs import SECONDS, finish, load, losses
from specforge_core.train.run import train

from ..processes import Process, alive, children, end, listening, patience, wait
from ..runs import linear_run
from .started import LONG, num_lines, start

pytest.importorskip("specforge_linear", reason="the linear example is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


def test_an_error_of_the_ranks_is_said_as_one_process_says_it(config: Path, tmp_path: Path) -> None:
    absent = f"data.capture_dir={tmp_path / 'absent'}"
    # a folder each: at once in one, the later of the two would find it taken
    places = [f"output_dir={tmp_path / name}" for name in ("alone", "both")]
    alone, both = start(config, 1, absent, places[0]), start(config, 2, absent, places[1])
    said = [process.communicate(timeout=SECONDS) for process in (alone, both)]
    assert (alone.returncode, both.returncode) == (2, 2)
    (alone_out, alone_err), (both_out, both_err) = said
    assert alone_out == both_out == ""
    # the line before says how many threads a process has, unless the first rank is ended before it
    (error,) = alone_err.splitlines()[1:]
    assert error.startswith("error: ")
    assert error == both_err.splitlines()[-1]
    assert len(both_err.splitlines()) <= 2


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
        assert time.monotonic() - killed < max(seconds, 2 * patience())
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
    paths = [str(env.path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    options = ("strategy.name=stuck", f"train.device={device}")
    # no fork may use CUDA where its parent has asked for the devices
    process = start(config, 2, *LONG, *options, env=environment, imports=device == "cuda")
    wait(process, lambda: num_lines(tmp_path) == 5)
    kill_launcher(process, 40)  # 30 on a machine that does nothing else
