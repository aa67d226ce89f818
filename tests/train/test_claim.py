"""One run at a time in an output directory, also when its launcher is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from specforge_core.drafts import checkpoint
from specforge_core.errors import ConfigError
from specforge_core.testing.toy import write_conversations
from specforge_core.train.claim import claim

HOLD = """
import sys, time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from specforge_core.train.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(
            ConfigError,
            match=rf"\(process {first.pid}\) is training in '{tmp_path}'. Wait for it, end it "
            rf"with `kill {first.pid}`, or try: output_dir=DIR",
        ),
        claim(tmp_path),
    ):
        pass
    first.kill()
    first.communicate()
    with claim(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with claim(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path):
        pass
    assert tmp_path.is_dir()
    with claim(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(ConfigError, match=r"\.lock cannot be written: "), claim(tmp_path):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ConfigError,
            match=r"cannot be written: Not a directory .*free there\). Try: output_dir=DIR",
        ),
        claim(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_ranks_save_and_end_when_their_launcher_is_killed(tmp_path: Path, toy_target: Path) -> None:
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    output = tmp_path / "run"
    raw = {
        "target": {"path": str(toy_target), "dtype": "float32", "batch_tokens": 256},
        "strategy": {"name": "linear"},
        "data": {"train": [str(write_conversations(tmp_path / "train.jsonl", 20))]},
        "output_dir": str(output),
        "train": {"max_steps": 100000, "save_every": 100000, "log_every": 1, "device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "specforge_core.cli", "train", "-c", str(path)]
    launcher = subprocess.Popen([*command, "--nproc", "2"], start_new_session=True)
    try:
        metrics = output / "metrics.jsonl"
        wait(lambda: metrics.exists() or launcher.poll() is not None)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        wait(lambda: not alive(int((output / ".lock").read_text())))
        state = checkpoint.read_state(checkpoint.find(output))
        train = state.config["train"]
        assert state.position == 2 * state.step * train["batch_size"] * train["accumulate"]
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(launcher.pid, signal.SIGKILL)


def wait(reached: Callable[[], bool]) -> None:
    for _ in range(1200):
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
