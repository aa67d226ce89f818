"""Values in messages: enough of them to find them again."""

from __future__ import annotations

import reprlib

WIDTH = 80

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxdict = 4
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = WIDTH


def shorten(value: object) -> str:
    """Return a value's repr, cut to a line however large the value is."""
    return cut(_REPR.repr(value), 2 * WIDTH)


def said(exc: BaseException) -> str:
    """Return what an exception says, whatever its class makes of that."""
    try:
        return str(exc)
    except Exception as other:
        return f"(its text cannot be made: {type(other).__name__})"


def cut(text: str, width: int = WIDTH) -> str:
    """Return a text of `width` characters, and how many there were if there were more."""
    return text if len(text) <= width else f"{text[:width]}... ({len(text)} characters)"
