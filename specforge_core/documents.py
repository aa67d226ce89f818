"""Documents that anyone may have put there: read whole, if they are files and not too large."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST = 1 << 28  # bytes: a manifest of a million shards has as many


def open_regular(path: Path) -> int:
    """Open a file for reading; return its number.  Raises OSError, and waits for no pipe."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return number


def read_document(path: Path, most: int = MOST) -> bytes:
    """Return what a file holds.

    Raises OSError: also for a pipe or a device, which may never end, and for more than `most`
    bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
    return data
