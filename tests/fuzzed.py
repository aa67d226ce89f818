"""Documents of JSON that are nearly right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = b"[" * 100_000
HUGE = b"9" * 5000
# for every field: below its range, above it, of no number, of another type
ODD = (-1, 0, 10**9 + 1, 1e308, float("nan"), float("inf"), "text", True, None, [1], {"a": 1})


def leaf() -> st.SearchStrategy[Any]:
    """Return values that JSON can write, the unusual ones often."""
    odd = [None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "\0", "../x"]
    return st.sampled_from([*odd, "\ud800", [], {}, [[]], {"a": None}, "x" * 5000]) | st.one_of(
        st.integers(), st.floats(), st.text(max_size=9)
    )


JSON = st.recursive(
    leaf(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def unsealed(text: bytes) -> bytes:
    """Return a manifest or provenance of a version without the checksum that would find changes."""
    told = json.loads(text)
    del told["checksum"]
    return json.dumps(told | ({"format_version": 3} if "identity" in told else {})).encode()


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside of another."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a document with another value in one place."""
    if not path:
        return value
    document = copy.deepcopy(document)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


@st.composite
def changed(draw: st.DrawFn, text: bytes) -> bytes:
    """Draw a document of JSON that is nearly `text`."""
    if draw(st.integers(0, 3)):
        document = json.loads(text)
        for _ in range(draw(st.integers(1, 2))):
            ways = list(places(document))
            document = replaced(document, draw(st.sampled_from(ways)), draw(JSON))
        return json.dumps(document).encode()
    at = draw(st.integers(0, len(text)))
    put = draw(st.sampled_from([b"", b"\0", b"\xff", b"{", b"]", b"1e999", HUGE, DEEP]))
    return text[:at] + put + text[at + draw(st.integers(0, 40)) :]
