"""Run an iterator in a background thread, a few items ahead of need."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

from .. import stop

POLL_SECONDS = 0.1  # between two looks whether the command was asked to end

T = TypeVar("T")


class _Failure:
    """An exception on its way from the thread to the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


class Prefetcher(Generic[T]):
    """Yield the items of `source` in order; at most `depth` wait ready.

    An exception in the thread is raised where its item would have been taken.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[object] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="specforge-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next item.  Raises Interrupted where a stop is asked for and none is ready."""
        item = self._get()
        if item is _END:
            self._queue.put(_END)  # every later call ends too
            raise StopIteration
        if isinstance(item, _Failure):
            self._queue.put(_END)
            raise item.error
        return item  # type: ignore[return-value]  # a T, by construction of _fill

    def _get(self) -> object:
        while True:
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (signum := stop.asked()) is not None:
                    raise stop.Interrupted(signum) from None

    def close(self, seconds: float = math.inf) -> None:
        """Stop the thread and wait for it: what it holds (files, the target) may be freed after.

        After `seconds` it is left alone with that: the process has to end.
        """
        self._stop.set()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until:
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        try:
            for item in self._source:
                self._put(item)
                if self._stop.is_set():
                    return
            self._put(_END)
        except BaseException as exc:
            self._put(_Failure(exc))

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
