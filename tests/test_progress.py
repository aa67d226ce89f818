from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from specforge_core import progress
from specforge_core.progress import Meter, track


def test_the_time_left_follows_the_speed_of_this_run_and_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1010.0))
    tracker = Meter("work", 100, None, started=1000.0)
    assert tracker.seconds_left() is None
    tracker.skip(50)
    assert tracker.seconds_left() is None
    tracker.advance(10, "fast")
    assert tracker.seconds_left() == 40
    tracker.deadline = 1015.5
    assert tracker.line() == "work 60/100  fast  0:05 left"


def test_lines_come_while_one_unit_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    shown, until = "", time.monotonic() + 20
    with track("slow work", 3) as tracker:
        tracker.advance()
        while "slow work 1/3" not in shown and time.monotonic() < until:
            time.sleep(0.01)
            shown += capsys.readouterr().err
    assert "slow work 1/3" in shown
    with track("hidden", 3, quiet=True):
        time.sleep(0.1)
    assert "hidden" not in capsys.readouterr().err
