"""Files that one process at a time may hold."""

from __future__ import annotations

import fcntl
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
