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


def test_short_work_has_a_first_and_a_last_line_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(steps: int, *, ends: bool = True) -> list[str]:
        with track("short work", 3, ends=ends) as tracker:
            tracker.skip(0)
            for step in range(steps):
                tracker.advance(1, f"loss {step}" if step else "")
        return [line.partition("  0:")[0] for line in capsys.readouterr().err.splitlines()]

    assert work(3) == ["short work 2/3  loss 1", "short work 3/3  loss 2"]
    assert work(2) == ["short work 2/3  loss 1"]
    assert work(1) == work(0) == work(3, ends=False) == []
