"""Documents that anyone may have put there: read whole, if they are files and not too large."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

PIECE = 1 << 20  # bytes read at once
MOST = 1 << 28  # bytes: a manifest of a million shards has as many


def open_regular(path: Path) -> int:
    """Open a file for reading; return its number.  Raises OSError, and waits for no pipe."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return number


def check_regular(path: Path) -> None:
    """Raise OSError for what is there and no file, or cannot be read.

    A library would wait for a pipe, or say of a file that it may not read that it is not there.
    """
    if path.exists():
        if not path.is_file():
            raise OSError("it is no regular file")
        os.close(open_regular(path))


def read_document(path: Path, most: int = MOST) -> bytes:
    """Return what a file holds.

    Raises OSError: also for a pipe or a device, which may never end, and for more than `most`
    bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = bytearray()
        while piece := file.read(PIECE):  # `read(most)` would take the memory at once
            data += piece
            if len(data) > most:
                raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
    return bytes(data)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON.  Raises OSError, and ValueError where there is none."""
    try:
        found = json.loads(read_document(path))
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def why_invalid(exc: ValidationError) -> str:
    """Return the first thing that is wrong with a document, where, and with which value."""
    error = exc.errors(include_url=False)[0]
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{where} is unknown"
    message = error["msg"].removeprefix("Value error, ")
    if not where:  # the document as a whole
        return message
    told = error["type"] in ("missing", "value_error")  # nothing, or what says it already
    return f"{where}: {message}" + ("" if told else f", got {error['input']!r:.60}")
