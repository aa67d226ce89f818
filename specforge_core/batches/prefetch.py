"""Run an iterator in a background thread, a few items ahead of need."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

import torch

from .. import stop
from .made import beside

POLL_SECONDS = 0.1  # between two looks whether the command was asked to end

T = TypeVar("T")


class _Failure:
    """An exception on its way from the thread to the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


class Prefetcher(Generic[T]):
    """Yield the items of `source` in order; at most `depth` wait ready while one more is made.

    So with a depth of 0 the next one is begun when one is taken.  What the thread launches on a
    GPU runs beside what others launch there: see `Made`.  An exception in the thread is raised
    where its item would have been taken.
    """

    def __init__(
        self,
        source: Iterator[T],
        depth: int,
        device: torch.device | None = None,
        *,
        inner: bool = False,
    ) -> None:
        """`inner`: another one takes the items, which hears of a stop itself."""
        self._source = source
        self._device, self._inner = device, inner
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth + 1)
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
        self._room.release()
        return item  # type: ignore[return-value]  # a T, by construction of _fill

    def _get(self) -> object:
        while True:
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._inner and (signum := stop.asked()) is not None:
                    raise stop.Interrupted(signum) from None

    def close(self, seconds: float = math.inf) -> None:
        """Stop the thread and wait for it: what it holds (files, the target) may be freed after.

        After `seconds` it is left alone with that: the process has to end.
        """
        self._stop.set()
        self._thread.join(None if seconds == math.inf else seconds)
        while not self._queue.empty():  # else they are held for as long as this is
            self._queue.get()
        self._queue.put(_END)

    def _fill(self) -> None:
        try:
            with beside(self._device, inner=self._inner):
                while self._may():
                    item = next(self._source, _END)
                    self._queue.put(item)
                    if item is _END:
                        return
        except BaseException as exc:
            self._queue.put(_Failure(exc))
        finally:
            if isinstance(self._source, Generator):
                self._source.close()  # in this thread, which may be the only one it can be

    def _may(self) -> bool:
        """Wait for room for one more item; False where no more is wanted."""
        while not self._room.acquire(timeout=POLL_SECONDS):
            if self._stop.is_set():
                return False
        return not self._stop.is_set()
