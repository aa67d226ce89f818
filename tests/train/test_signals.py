"""Training and captures that are told to stop, wherever they are."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.drafts import checkpoint
from specforge_core.testing.forked import cli
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import finish, lines, load

from ..processes import end, wait
from ..runs import linear_run
from .growing import EPOCHS, GROWS
from .started import LONG, left_nothing, num_lines, start

pytest.importorskip("specforge_linear", reason="the linear example is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


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
    manifest = CaptureManifest.read(directory)
    assert manifest.complete
    manifest.model_copy(update={"complete": False}).write(directory)
    return f"data.capture_dir={directory}"


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


# as a server that is asked for answers, and gives none
SILENT = """
    import threading
    from specforge_core import hookimpl
    from specforge_core.target.engine import TransformersEngine

    class Silent(TransformersEngine):
        answers_beside = True

        def generate(self, prompts, options):
            threading.Event().wait()

    @hookimpl
    def specforge_target_engine(target, device):
        return Silent.load(target, device) if target.engine == "silent" else None
"""


@pytest.mark.parametrize(
    ("ranks", "signals"), [(1, [signal.SIGTERM]), (2, [signal.SIGINT, signal.SIGINT])]
)
def test_a_wait_for_answers_stops_and_keeps_its_steps(
    config: Path, tmp_path: Path, fake_site: FakeSite, ranks: int, signals: list[int]
) -> None:
    group = {"specforge.plugins": {"silent": "silent_engine"}}
    fake_site.dist("silent-engine", "0.1.0", group, module="silent_engine", source=SILENT)
    options = (*GROWS, f"regenerate.prompts=[{tmp_path / 'train.jsonl'}]", "target.engine=silent")
    command = ("train", "-c", str(config), "--nproc", str(ranks), *options)
    env = os.environ | {"PYTHONPATH": str(fake_site.path)}
    process = cli(*command, f"train.batch_size={2 // ranks}", env=env)
    wait(process, lambda: num_lines(tmp_path) == EPOCHS[0])
    time.sleep(0.5)  # in which the next step would be done
    status, out, err = end(process, *signals)
    assert status == 128 + signals[0]
    assert out.startswith(f"stopped at step {EPOCHS[0]}/16"), err
    assert out.endswith(". Start the same command again to go on\n")
    assert err.splitlines()[1:] == []
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state.step == num_lines(tmp_path) == EPOCHS[0]
    assert state.grown is not None
    assert state.grown.asked == [(0, 3), (3, 6)]


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
    lock = tmp_path / "run" / ".lock"
    wait(process, lambda: lock.exists() and lock.read_text() != "")  # it is the run's own
    began = time.monotonic()
    status, out, err = end(process, signal.SIGINT)
    assert (status, out) == (130, "")
    assert err.count("stopped by") == 1
    assert err.endswith(
        "stopped by SIGINT: nothing that was finished is lost. "
        "Start the same command again to go on\n"
    )
    assert len(err.splitlines()) <= 2
    assert left_nothing(tmp_path / "run", began)


def test_two_signals_save_once_and_the_run_goes_on_as_if_undisturbed(
    config: Path, tmp_path: Path
) -> None:
    process = start(config, 2, *LONG, "train.batch_size=1")
    wait(process, lambda: num_lines(tmp_path) > 3)
    status, out, err = end(process, signal.SIGTERM, signal.SIGTERM, apart=0.05)
    assert status == 143
    assert out.count("\n") == 1
    assert "stopped at step" in out
    assert len(err.splitlines()) == 1
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state.step == lines(tmp_path / "run")[-1]["step"]


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
