"""Values in messages: enough of them to find them again."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable

WIDTH = 80
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, marks without a shape, halves, separators
KEPT = "\n\t\u200c\u200d"  # the joiners of Persian, Hindi and emoji

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


def harmless(text: str) -> str:
    """Return a text whose characters that a terminal would obey, or hide, are their escapes.

    Line ends, tabs and joiners stay; what turns the direction of text does not.
    """
    return "".join(
        char if char in KEPT or unicodedata.category(char) not in HIDDEN else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    code = f"{ord(char):x}"
    letter, digits = next(kind for kind in (("x", 2), ("u", 4), ("U", 8)) if len(code) <= kind[1])
    return f"\\{letter}{code:>0{digits}}"


def in_units(count: float) -> str:
    """Return a number of bytes as a reader writes it, in units of 1000s, as disks are sold."""
    units = iter(("bytes", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and (larger := next(units, None)):  # less is 999 in three digits
        count, unit = count / 1000, larger
    return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 999.5 else f"{count:.3g} {unit}"


def in_time(seconds: float) -> str:
    """Return a time in the largest of s, min, h and days that it is two of, in three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
    return f"{seconds:.3g} s"


def line_of(data: bytes) -> str:
    """Return a line of a file as a message shows it, whatever bytes it has."""
    return shorten(harmless(data[: 4 * WIDTH].decode(errors="replace")))


def counted(count: int, noun: str) -> str:
    """Return "1 line", "2 lines", "1,000 lines": of nouns whose plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def meant(name: str, known: Iterable[str], told: str, otherwise: str = "") -> str:
    """Return `told` of the known name that was meant, or else what to install.

    A misspelled name is nothing to install: a package of that name would be anybody's.
    """
    for close in difflib.get_close_matches(cut(name), known, n=1):
        return told.format(close)
    return f"{otherwise}Try: pip install specforge-{cut(name)}"
