"""Files that one process at a time may hold, and what one thread at a time may use."""

from __future__ import annotations

import fcntl
import threading
from collections import deque
from contextlib import suppress
from typing import IO, Any


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
