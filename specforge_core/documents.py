"""Documents that anyone may have put there: read whole, if they are files and not too large."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

PIECE = 1 << 20  # bytes read at once
# a text, which is a key where a colon follows, and what begins and ends an object
KEY = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(?=\s*(:)?)|[{}]', re.DOTALL)
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
    found = parse_json(read_document(path))
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


class KeyTwice(ValueError):
    """An object of JSON has a key twice, with two values, of which the last would hide the first.

    `key` is that, and `lines` are those of both in the text, if there is one, from `first` on.
    """

    def __init__(self, key: str, text: str | None = None, first: int = 1) -> None:
        self.key, self.lines = key, None if text is None else _lines_of(key, text, first)
        where = "" if self.lines is None else f" (lines {self.lines[0]} and {self.lines[1]})"
        super().__init__(f"the key {key!r:.60} is there twice{where}")


def parse_json(data: bytes) -> Any:
    """Return what a document of JSON says.  Raises ValueError: KeyTwice, too."""
    try:
        return json.loads(data, object_pairs_hook=each_key_once)
    except KeyTwice as exc:
        raise KeyTwice(exc.key, data.decode(json.detect_encoding(data), "replace")) from None
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, as its `object_pairs_hook`; KeyTwice, without lines."""
    found = dict(pairs)
    if len(found) < len(pairs) and (other := [key for key, x in pairs if x != found[key]]):
        raise KeyTwice(other[0])
    return found


def decode_one(text: str, place: int, line: int) -> tuple[Any, int]:
    """Return the value of JSON that begins at `place`, and where it ends; `text` begins in `line`.

    A KeyTwice in the place of a value that has a key twice.  Raises JSONDecodeError.
    """
    try:
        return json.JSONDecoder(object_pairs_hook=each_key_once).raw_decode(text, place)
    except KeyTwice as exc:
        end = json.JSONDecoder().raw_decode(text, place)[1]
        return KeyTwice(exc.key, text[place:end], line + text.count("\n", 0, place)), end


def _lines_of(key: str, text: str, line: int) -> tuple[int, int] | None:
    """Return the lines in which the first object of valid JSON that has a key twice has it."""
    open_objects: list[int | None] = []  # where each has the key
    for found in KEY.finditer(text):
        if found[0] == "{":
            open_objects.append(None)
        elif found[0] == "}":
            open_objects.pop()
        elif found[1] and json.loads(found[0], strict=False) == key:
            if (first := open_objects[-1]) is not None:
                second = found.start()
                return line + text.count("\n", 0, first), line + text.count("\n", 0, second)
            open_objects[-1] = found.start()
    return None


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
