"""Which server gets the next request, and which servers are out of service.

A request goes to the server with the least outstanding.  One that fails is retired: its requests
go to the others, and every few seconds one thread asks whether it is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from specforge_core.errors import CaptureError, RunError
from specforge_core.progress import console
from specforge_core.records import in_message
from specforge_core.text import harmless

from .http_json import ServerDown, Unreachable

RETRY_SECONDS = 3.0  # between two looks at a server that was retired


class Addressed(Protocol):
    """A client of one server."""

    @property
    def url(self) -> str: ...


C = TypeVar("C", bound=Addressed)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Server(Generic[C]):
    """One server and what is known of it."""

    client: C
    outstanding: int = 0  # what it is working on, in the units of `acquire`
    retired: str | None = None  # why, if it is
    retry_at: float = 0.0
    served: int = 0  # requests


@dataclass(slots=True)
class Pool(Generic[C]):
    """The servers of one engine.  `check` raises ServerDown while a server is not back."""

    servers: Sequence[Server[C]]
    check: Callable[[C], None]
    patience: float  # seconds to wait while all are retired
    closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, down: Mapping[Server[C], ServerDown], start: str, *, wait: bool) -> None:
        """Leave out the servers that were `down` when they were first looked at.

        Where all of them were, one is waited for; but where nobody listens at their addresses,
        only if the user said so (`wait`): else RunError, with how to `start` one.
        """
        none = len(down) == len(self.servers)
        if none and not wait and all(isinstance(exc, Unreachable) for exc in down.values()):
            listing = "\n  ".join(f"{server.client.url}: {exc}" for server, exc in down.items())
            raise RunError(
                f"no server of the target engine answers:\n  {listing}\nTry: {start}; or correct "
                "target.options.urls; or target.options.patience=600, which waits so many seconds "
                "for one that is being started"
            )
        for server, exc in down.items():
            self.retire(server, str(exc))
        if none:
            self.release(self.acquire(0), 0, served=False)  # waits, or says who is down

    def acquire(self, cost: int) -> Server[C]:
        """Return the server with the least outstanding, and count `cost` to it.

        Waits while all are retired; RunError when none came back in time.
        """
        give_up = time.monotonic() + self.patience
        while True:
            with self._changed:
                if self.closed:
                    raise CaptureError("the target engine was closed")
                usable = [s for s in self.servers if s.retired is None]
                due = self._take_due()
                if due is None and usable:
                    best = min(usable, key=lambda s: s.outstanding)
                    best.outstanding += cost
                    return best
                if due is None and time.monotonic() >= give_up:
                    raise RunError(self._all_down())
                if due is None:
                    self._changed.wait(0.1)
            if due is not None:
                self._revive(due)

    def release(self, server: Server[C], cost: int, served: bool) -> None:
        """Take `cost` off a server's account again."""
        with self._changed:
            server.outstanding -= cost
            server.served += served
            self._changed.notify_all()

    def retire(self, server: Server[C], reason: str) -> None:
        """Give a server no more work until it answers again."""
        with self._changed:
            first, server.retired = server.retired is None, reason
            server.retry_at = time.monotonic() + RETRY_SECONDS
            left = any(other.retired is None for other in self.servers)
            self._changed.notify_all()
        if first and not self.closed:
            why = harmless(in_message(reason))
            then = "going on without" if left else f"no other is left, waiting {self.patience:g} s"
            console.print(f"{server.client.url} failed ({why}); {then}")

    def _take_due(self) -> Server[C] | None:
        """Return a retired server that it is time to look at; no one else gets it meanwhile."""
        now = time.monotonic()
        for server in self.servers:
            if server.retired is not None and server.retry_at <= now:
                server.retry_at = float("inf")
                return server
        return None

    def _revive(self, server: Server[C]) -> None:
        reason = None
        try:
            self.check(server.client)
        except ServerDown as exc:
            reason = str(exc)
        except BaseException:
            self.retire(server, "its check failed")
            raise
        with self._changed:
            server.retired = reason
            server.retry_at = time.monotonic() + RETRY_SECONDS
            self._changed.notify_all()

    def _all_down(self) -> str:
        listing = "\n  ".join(f"{s.client.url}: {s.retired}" for s in self.servers)
        return (
            f"no server of the target engine can be used, and none came back in "
            f"{self.patience:.0f} s:\n  {listing}\nTry: start them again, then the same command. "
            "What it has stored stays"
        )


def each(items: Sequence[T], work: Callable[[T], R], at_once: int) -> Iterator[R]:
    """Yield `work(item)` of all items as they finish; at most `at_once` run at a time.

    The first failure is raised, after what had finished before it.  Nothing new is begun once
    the caller stops asking.
    """
    waiting = list(reversed(items))
    done: SimpleQueue[tuple[R | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            while True:
                try:
                    item = waiting.pop()
                except IndexError:
                    return
                done.put((work(item), None))
        except BaseException as exc:
            done.put((None, exc))

    # daemons: an interrupted run does not wait for answers that nobody reads
    for _ in range(min(len(items), at_once)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(len(items)):
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]  # work's own, whatever it is
    finally:
        waiting.clear()
