"""Memory for what arrives, used again: new memory costs more than filling it."""

from __future__ import annotations

from typing import Any
from weakref import finalize

import numpy as np


class Buffers:
    """Gives arrays of bytes; an array's memory comes back when nothing shares it any more.

    Up to `keep` bytes are kept for the next arrays.  Safe to use from several threads.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._free: list[Any] = []  # appended to and popped from, which needs no lock

    def take(self, size: int) -> Any:
        """Return an array of `size` bytes, with anything in them."""
        try:
            whole = self._free.pop()
        except IndexError:
            whole = None
        if whole is None or len(whole) < size:
            whole = np.empty(size, dtype=np.uint8)  # not filled with zeros, as a bytearray would be
        part = whole[:size]
        finalize(part, self._give_back, whole).atexit = False
        return part

    def _give_back(self, whole: Any) -> None:
        if sum(map(len, list(self._free))) + len(whole) <= self._keep:
            self._free.append(whole)
