"""Which server gets the next prompt, and which servers are out of service.

A prompt goes to the server with the fewest tokens outstanding.  One that fails is retired: its
prompts go to the others, and every few seconds one thread asks whether it is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specforge_core.errors import CaptureError
from specforge_core.http_json import ServerDown

from .client import Client

RETRY_SECONDS = 3.0  # between two looks at a server that was retired


@dataclass(slots=True, eq=False)
class Server:
    """One server and what is known of it."""

    client: Client
    outstanding: int = 0  # tokens of the prompts it is working on
    retired: str | None = None  # why, if it is
    retry_at: float = 0.0
    served: int = 0  # prompts


@dataclass(slots=True)
class Pool:
    """The servers of one engine.  `check` raises ServerDown while a server is not back."""

    servers: Sequence[Server]
    check: Callable[[Client], None]
    patience: float  # seconds to wait while all are retired
    closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def acquire(self, tokens: int) -> Server:
        """Return the server with the fewest tokens outstanding, and count `tokens` to it.

        Waits while all are retired; CaptureError when none came back in time.
        """
        give_up = time.monotonic() + self.patience
        while True:
            with self._changed:
                usable = [s for s in self.servers if s.retired is None]
                due = self._take_due()
                if due is None and usable:
                    best = min(usable, key=lambda s: s.outstanding)
                    best.outstanding += tokens
                    return best
                if self.closed:
                    raise CaptureError("the target engine was closed")
                if due is None and time.monotonic() >= give_up:
                    raise CaptureError(self._all_down())
                if due is None:
                    self._changed.wait(0.1)
            if due is not None:
                self._revive(due)

    def release(self, server: Server, tokens: int, served: bool) -> None:
        """Take `tokens` off a server's account again."""
        with self._changed:
            server.outstanding -= tokens
            server.served += served
            self._changed.notify_all()

    def retire(self, server: Server, reason: str) -> None:
        """Give a server no more work until it answers again."""
        with self._changed:
            server.retired = reason
            server.retry_at = time.monotonic() + RETRY_SECONDS
            self._changed.notify_all()

    def _take_due(self) -> Server | None:
        """Return a retired server that it is time to look at; no one else gets it meanwhile."""
        now = time.monotonic()
        for server in self.servers:
            if server.retired is not None and server.retry_at <= now:
                server.retry_at = float("inf")
                return server
        return None

    def _revive(self, server: Server) -> None:
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
            f"no SGLang server can be used, and none came back in {self.patience:.0f} s:\n"
            f"  {listing}\nTry: start them again, then the same command, which goes on where it "
            "stopped"
        )
