from __future__ import annotations

import time

import pytest

from specforge_core import progress
from specforge_core.progress import Meter, track


def test_the_time_left_follows_the_speed_of_this_run_and_the_deadline() -> None:
    tracker = Meter("work", 100, None, started=time.monotonic() - 10)
    assert tracker.seconds_left() is None
    tracker.skip(50)
    assert tracker.seconds_left() is None
    tracker.advance(10, "fast")
    assert tracker.seconds_left() == pytest.approx(40, abs=0.5)
    tracker.deadline = time.monotonic() + 5.5
    assert tracker.line() == "work 60/100  fast  0:05 left"


def test_lines_come_while_one_unit_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    with track("slow work", 3) as tracker:
        tracker.advance()
        time.sleep(0.5)
    assert "slow work 1/3" in capsys.readouterr().err
    with track("hidden", 3, quiet=True):
        time.sleep(0.1)
    assert "hidden" not in capsys.readouterr().err
