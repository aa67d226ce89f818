"""What the launcher of ranks says of their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specforge_core.process import Report
from specforge_core.train import launch


def test_a_killed_rank_is_the_cause_however_late_that_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have no time for the launcher, and the other rank tells what it met."""

    def sleeping(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], **options))
        return started[-1]

    started: list[subprocess.Popen[bytes]] = []
    late = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=sleeping))
    monkeypatch.setattr(launch, "time", clock)
    ranks = launch.Ranks(tmp_path)
    for rank in range(2):
        ranks.start(rank, 2, [])
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
