"""What is said where something cannot be written: which file, why, and what to do first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import SpecForgeError
from .text import cut, in_units

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_PLACE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
NO_PLACE |= {errno.ELOOP, errno.ENAMETOOLONG}
MAKE_ROOM = "Make room there"
CANNOT_WRITE = {*NO_ROOM, *NO_RIGHT, errno.EFBIG, errno.ENAMETOOLONG}


@contextmanager
def refusing(error: type[SpecForgeError], advice: str, path: Path | None = None) -> Iterator[None]:
    """Raise `error` in the place of an OSError: which file, why, the room there, what to do."""
    try:
        yield
    except OSError as exc:
        raise error(f"{cannot_write(exc, path)}. {remedied(advice, exc)}") from exc


def remedied(advice: str, exc: OSError) -> str:
    """Return advice that begins with making room as it is where something else is wrong."""
    if exc.errno in NO_ROOM:
        return advice
    first = "Look what is wrong there"
    if exc.errno in NO_RIGHT:
        first = "Get the right to write there"
    elif exc.errno in NO_PLACE:
        first = "Correct that path"
    elif exc.errno == errno.EFBIG:
        first = "Raise the limit on the size of files (ulimit -f)"
    return advice.replace(MAKE_ROOM, first)


def system_error(exc: Exception, path: Path) -> OSError:
    """Return the OSError behind another package's error, which may have it as text only."""
    if isinstance(exc, OSError):
        return OSError(exc.errno, exc.strerror or str(exc), str(path))
    if found := re.search(r"\(os error (\d+)\)", str(exc)):  # Rust's way to say it
        number = int(found[1])
        return OSError(number, os.strerror(number), str(path))
    return OSError(None, str(exc), str(path))


def cannot_write(exc: OSError, path: Path | None = None) -> str:
    """Say which file (`path` where the error does not know) cannot be written, and why."""
    known = isinstance(exc.filename, str | bytes | Path)  # not the number of an open file
    name = exc.filename if known else path
    place = None if name is None else Path(os.fsdecode(name))
    shown = "a file" if place is None else cut(str(place), 200)
    room = _room(place) if exc.errno in NO_ROOM else ""
    return f"{shown} cannot be written: {exc.strerror or exc}{room}"


def _room(place: Path | None) -> str:
    """Return the room where a file was to be, as a part of a sentence."""
    if place is None:
        return ""
    for folder in place.absolute().parents:
        with suppress(OSError):
            return f" ({in_units(shutil.disk_usage(folder).free)} free there)"
    return ""
