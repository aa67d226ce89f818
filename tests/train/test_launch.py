"""What the launcher of ranks says of their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from specforge_core import stop
from specforge_core.errors import ConfigError
from specforge_core.process import PRIVATE, Report, _run
from specforge_core.train import launch

Started = list[subprocess.Popen[bytes]]


def begin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *commands: list[str]
) -> tuple[launch.Ranks, Started]:
    """Start ranks that are other commands."""

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(commands[len(started)], **options))
        return started[-1]

    started: Started = []
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=start))
    ranks = launch.Ranks(folder)
    for rank in range(len(commands)):
        ranks.start(rank, len(commands), [])
    return ranks, started


def test_a_killed_rank_is_the_cause_however_late_that_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have no time for the launcher, and the other rank tells what it met."""
    late = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late)
    monkeypatch.setattr(launch, "time", clock)
    ranks, started = begin(tmp_path, monkeypatch, ["sleep", "60"], ["sleep", "60"])
    assert ranks._running() == [0, 1]
    os.kill(started[1].pid, signal.SIGKILL)
    started[1].wait()
    told = Report(0, "the connection was closed by the peer", 1, time.monotonic())
    (tmp_path / "rank-0.json").write_text(json.dumps(asdict(told)))
    late = 30.0
    assert ranks._running() == [0]
    ranks.kill()
    message, status = ranks.verdict()
    assert message.startswith("error: rank 1 was killed by SIGKILL")
    assert status == 1


@pytest.mark.parametrize("told_by", [0, 1])
def test_of_ranks_that_were_stopped_only_the_first_may_have_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: int
) -> None:
    """Another that ends without a word, on a disk that is busy, say, leaves nothing untold."""
    ended = ["sh", "-c", f"exit {128 + signal.SIGTERM}"]
    ranks, started = begin(tmp_path, monkeypatch, ended, ended)
    told = Report(told_by, "stopped by SIGTERM: here", 128 + signal.SIGTERM, time.monotonic())
    (tmp_path / f"rank-{told_by}.json").write_text(json.dumps(asdict(told)))
    for process in started:
        process.wait()
    message, status = ranks.verdict()
    assert status == 128 + signal.SIGTERM
    assert message.startswith("stopped by SIGTERM: nothing") == (told_by == 0)


def test_of_ranks_that_fail_alike_debug_shows_one_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def train() -> None:
        raise ConfigError("no such target")

    monkeypatch.setattr(sys, "argv", ["specforge", "--debug"])
    monkeypatch.setenv(PRIVATE, str(tmp_path))
    ranks, started = begin(tmp_path, monkeypatch, ["false"], ["false"])
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert _run(click.command(train)) == 1
        started[rank].wait()
    assert capfd.readouterr() == ("", "")
    message, status = ranks.verdict()
    assert status == 1
    assert message.startswith("error: Traceback (most recent call last):\n")
    assert message.endswith("\nspecforge_core.errors.ConfigError: no such target")
    assert message.count("Traceback") == 1


def test_a_rank_whose_python_only_starts_says_nothing_of_a_sigint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Until it listens itself, Python would end with a traceback, one of each rank."""
    starts = [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(60)"]
    ranks, _ = begin(tmp_path, monkeypatch, starts, starts)
    until = time.monotonic() + 60
    while len(capfd.readouterr().out) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    monkeypatch.setattr(stop, "_state", stop._State(signum=signal.SIGINT, count=1))
    ranks.wait()
    message, status = ranks.verdict()
    assert status == 128 + signal.SIGINT
    assert message.startswith("stopped by SIGINT: nothing")
    assert capfd.readouterr().err == ""
