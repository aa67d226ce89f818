"""Files that one process at a time may hold, and what one thread at a time may use."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

SWEEP_SECONDS, POLL_SECONDS = 10.0, 0.001  # for which another process may hold what it removes
TRIES = 100  # of making something that another process sweeps


def hold(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Take an open file's lock until it is closed or this process ends; False if another has it.

    Those that are `shared` bear each other.  On a file system without locks everyone gets it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_at(number: int, path: Path) -> bool:
    """Say whether an open file is still the one at `path`: who held it may have removed it."""
    try:
        return os.path.samestat(os.fstat(number), path.lstat())
    except FileNotFoundError:
        return False


def hold_new(path: Path, make: Callable[[], int]) -> int:
    """Return the number of what `make` makes and opens at `path`, held.

    What is not held yet looks like what a killed process has left.  It is made again where another
    process has taken it for that and removed it; but not for ever: in a working directory that was
    removed nothing can be made.  Nobody else knows the name, so what has it is the same.
    """
    tries = 0
    while True:
        tries += 1
        try:
            number = make()
        except FileNotFoundError:  # a folder is made first and opened then
            if tries == TRIES or not path.parent.is_dir():
                raise
            continue
        until = time.monotonic() + SWEEP_SECONDS
        while not hold(number) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if tries == TRIES or os.path.lexists(path):
            return number
        os.close(number)


def release(file: IO[Any] | int) -> None:
    """Give an open file's lock back before it is closed."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


class InTurn:
    """A lock that threads have in the order in which they asked for it.

    Who holds it for long may let those go first that wait; a plain lock would be its own again
    before they wake up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: deque[object] = deque()  # the first of them holds it

    def __enter__(self) -> None:
        me = object()
        with self._changed:
            self._asked.append(me)
            try:
                self._changed.wait_for(lambda: self._asked[0] is me)
            except BaseException:  # a signal's
                self._asked.remove(me)
                self._changed.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._asked.popleft()
            self._changed.notify_all()

    def waiting(self) -> int:
        """Return how many wait for its holder."""
        return max(0, len(self._asked) - 1)

    def give_way(self) -> None:
        """Let all that wait have it, one after the other, and take it again.

        For its holder, in a thread that no signal interrupts.
        """
        if self.waiting():
            self.__exit__()
            self.__enter__()
