"""Files that one process at a time may hold."""

from __future__ import annotations

import fcntl
from typing import IO, Any


def hold(file: IO[Any] | int) -> bool:
    """Take an open file's lock until it is closed or this process ends; False if another has it.

    On a file system without locks everyone gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
