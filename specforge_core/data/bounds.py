"""Bounds on what somebody else wrote: the time and the memory of a chat template."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 5.0  # of processor time, that the work on one row may take
MEMORY = 2 << 30  # bytes, that one rendering may take
AGAIN = 1.0  # seconds after which what went on nevertheless is ended again


@contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this block when it takes more processor time, and again after it.

    Only in the main thread, where Python runs handlers; elsewhere there is no bound.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = False

    def late(signum: int, frame: FrameType | None) -> None:
        if not over:
            raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Raise MemoryError in this block when the process needs `size` bytes more than before.

    Where the system does not say what it needs, or keeps to no limit, there is no bound.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, ValueError):
        yield
        return
    most = pages * resource.getpagesize() + size
    if limits[0] != resource.RLIM_INFINITY:
        most = min(most, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
