"""Conversations to rows of tokens in as many processes as there are cores, in their order.

Few conversations are done here: a process takes seconds to begin.  What a process cannot do, or
does not live to do, is done here too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeAlias

from ..errors import DataError
from .chat import Row
from .rows import RowMaker
from .sources import BadRow, Conversation

FIRST = 2000  # conversations that are done before a process is begun
CHUNK = 128  # that a process is given at once
PROGRAM = "from specforge_core.data.workers import work; work({fd})"

Item: TypeAlias = Conversation | DataError
Made: TypeAlias = list[Row] | DataError


def make_rows(
    items: Iterable[Item], make: RowMaker, workers: int
) -> Generator[tuple[Item, Made], None, None]:
    """Yield each conversation with its rows, or with what is wrong with it, in their order."""
    items = iter(items)
    for item in islice(items, FIRST if workers > 1 else None):
        yield item, _made(make, item)
    chunk = list(islice(items, CHUNK))
    if not chunk:
        return
    with ExitStack() as stack:
        pool = [Worker(make) for _ in range(workers)]
        for worker in pool:
            stack.callback(worker.close)
        given: deque[tuple[Worker, list[Item]]] = deque()
        while chunk or given:
            done: list[Item] = []
            found: list[Made] | None = None
            free = next((one for one in pool if one.is_free()), None)
            if given and (free is None or not chunk):
                free, done = given.popleft()
                found = free.take()
            # it works on while the rows that it made are written
            if chunk and free is not None and free.is_free() and free.give(chunk):
                given.append((free, chunk))
                chunk = list(islice(items, CHUNK))
            elif not given and not done:
                done, chunk = chunk, list(islice(items, CHUNK))
            yield from zip(done, found or _here(done, make), strict=True)


def _here(chunk: Iterable[Item], make: RowMaker) -> Iterator[Made]:
    return (_made(make, item) for item in chunk)


def _made(make: RowMaker, item: Item) -> Made:
    if isinstance(item, DataError):
        return item
    try:
        return make(item)
    except BadRow as exc:
        return exc.at(item.where)


class Worker:
    """A process that makes rows.  It ends when this one closes its pipe, or is gone."""

    def __init__(self, make: RowMaker) -> None:
        self._make = make
        self._pipe, other = Pipe()
        fd = other.fileno()
        # Ctrl-C is for this process alone
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM.format(fd=fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()
        self._state = "starting"

    def is_free(self) -> bool:
        """Say whether it can be given something."""
        if self._state == "starting":
            try:
                if self._pipe.poll():
                    self._pipe.recv()
                    self._pipe.send(self._make)
                    self._state = "free"
            except Exception:  # it did not start, or cannot be given this tokenizer
                self._state = "lost"
        return self._state == "free"

    def give(self, chunk: list[Item]) -> bool:
        """Hand over conversations; False where it is gone."""
        try:
            self._pipe.send(chunk)
            self._state = "busy"
        except Exception:  # it is gone, or a row holds what no pipe takes
            self._state = "lost"
        return self._state == "busy"

    def take(self) -> list[Made] | None:
        """Wait for the rows of what it was given; None where it is gone."""
        try:
            found: list[Made] = self._pipe.recv()
        except (EOFError, OSError):
            self._state = "lost"
            return None
        self._state = "free"
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.wait()


def work(fd: int) -> None:
    """Make rows of what comes through a pipe until it is closed: the program of a worker."""
    with suppress(EOFError, OSError), Connection(fd) as pipe:
        pipe.send(True)
        make = pipe.recv()
        while True:
            pipe.send([_made(make, item) for item in pipe.recv()])
