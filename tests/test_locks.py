"""A file's lock is one process's, until it is closed; another is had by threads in turn."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from specforge_core.files import write_file
from specforge_core.locks import InTurn, hold


def test_a_file_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a") as first, path.open("a") as second:  # each opening is a holder of its own
        assert hold(first)
        assert not hold(second)
        first.close()
        assert hold(second)


def test_what_cannot_be_made_is_not_made_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a working directory that was removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        write_file(Path("a"), b"x")


def test_threads_have_their_turn_in_the_order_in_which_they_asked() -> None:
    """Also where the holder would take it again at once."""
    lock, had, running = InTurn(), [], []

    def use(name: int) -> None:
        with lock:
            had.append(name)

    with lock:
        for name in range(5):
            running.append(threading.Thread(target=use, args=(name,)))
            running[-1].start()
            while lock.waiting() <= name:
                time.sleep(0.001)
        assert had == []
        lock.give_way()
        assert had == list(range(5))
        lock.give_way()  # nobody waits
    assert not lock._asked
    for thread in running:
        thread.join(20)


def test_who_gives_up_waiting_is_passed_over() -> None:
    """A signal's exception, say, comes where the main thread waits."""
    lock, entered, leave = InTurn(), threading.Event(), threading.Event()

    def hold_on() -> None:
        with lock:
            entered.set()
            assert leave.wait(60)

    holder = threading.Thread(target=hold_on)
    holder.start()
    assert entered.wait(20)

    def give_up_soon() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # in whatever of the next lines it comes
        with lock:
            raise AssertionError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            give_up_soon()
    finally:
        signal.signal(signal.SIGALRM, before)
        leave.set()
    with lock:
        assert lock._asked
    holder.join(20)
    assert not lock._asked


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
