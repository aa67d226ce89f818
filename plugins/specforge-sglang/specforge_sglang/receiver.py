"""Frames over HTTP: a small server in the reader's process that they are posted to.

It listens on one address, for requests that know its token and the name of a frame that is waited
for.  Others, and those that are slow, large or many, cost it little.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from specforge_openai.deadline import TimedReader
from specforge_sglang_capture import spool
from specforge_sglang_capture.ask import Way

from specforge_core.errors import ConfigError

from .buffers import Buffers
from .handoff import FileHandoff, Handoff
from .options import SGLangOptions

LOOPBACK = "127.0.0.1"
LOCAL = {"localhost", LOOPBACK, "::1"}
MAX_CONNECTIONS = 64  # at once; each server has a few threads that post
HANG_UP_SECONDS = 1.0  # for a connection's thread to end that is closed for a new one
HEAD_SECONDS = 10.0  # for a request's head
IDLE_SECONDS = 30.0  # between two parts of a body
NOT_FOUND, LENGTH_REQUIRED, TOO_LARGE = 404, 411, 413


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # all servers may post at once

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._strangers: dict[Any, None] = {}  # connections that have shown no token, oldest first
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        super().__init__(found[4][:2], handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection; where there are too many, the oldest stranger goes.

        Who knows the token shows it at once, so that many who say nothing keep nobody out.
        """
        if not self._slots.acquire(blocking=False):
            self._hang_up()
            if not self._slots.acquire(timeout=HANG_UP_SECONDS):
                self.shutdown_request(request)  # the other side tries again
                return
        self._strangers[request] = None
        super().process_request(request, client_address)

    def welcome(self, request: Any) -> None:
        """Keep a connection that has shown the token."""
        self._strangers.pop(request, None)

    def _hang_up(self) -> None:
        for request in list(self._strangers):
            self._strangers.pop(request, None)
            with contextlib.suppress(OSError):  # it was about to end
                request.shutdown(socket.SHUT_RDWR)
                return

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._strangers.pop(request, None)
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class HttpHandoff:
    """A small server in this process that frames are posted to.

    `host` is what other machines call this one; without it only this machine is served.  `bind`
    is the address to listen on, where it is another.  Bodies of up to `keep` bytes are kept in
    memory to be used again.
    """

    way: Way = "http"

    def __init__(
        self, host: str | None = None, port: int = 0, keep: int = 1 << 30, bind: str | None = None
    ) -> None:
        self._token = secrets.token_urlsafe(16)
        self._arrived: dict[str, Any] = {}
        self._buffers, self._keep = Buffers(keep), keep
        self._expected: dict[str, int] = {}  # name -> the most bytes it may have
        self._changed = threading.Condition()
        handoff = self

        class Receiver(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                self.rfile.close()
                self.timed = TimedReader(self.connection, time.monotonic() + HEAD_SECONDS)
                self.rfile = io.BufferedReader(self.timed)

            def do_POST(self) -> None:
                status = handoff._receive(self, self.timed)
                self.close_connection = True
                with contextlib.suppress(OSError):  # it did not wait for the answer
                    if status == 200:
                        self.send_response(status)
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                    elif status:
                        self.send_error(status)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        listening = bind or host or LOOPBACK
        try:
            self._server = _Listener(listening, port, Receiver)
        except OSError as exc:
            raise ConfigError(
                f"port {port} of {listening!r} cannot be listened on: {exc.strerror}. Try: "
                "target.options.receiver_port=0, or target.options.receiver_bind=ADDRESS, one of "
                "this machine's own"
            ) from exc
        self.host = host or LOOPBACK
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def place(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self._server.server_address[1]}/{self._token}"

    def expect(self, name: str, most: int | None = None) -> None:
        """Let a frame called `name` in, of at most `most` bytes."""
        with self._changed:
            self._expected[name] = self._keep if most is None else most

    def _receive(self, request: BaseHTTPRequestHandler, timed: TimedReader) -> int | None:
        """Take one frame in; return the status to answer with, None where nobody listens."""
        token, _, name = request.path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode(), self._token.encode())
        with self._changed:
            most = self._expected.get(name)
        if not known or most is None:
            return NOT_FOUND
        self._server.welcome(request.connection)
        length = request.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return LENGTH_REQUIRED
        if len(length) > 20 or int(length) > most:
            return TOO_LARGE
        body = self._buffers.take(int(length))
        view, have = memoryview(body), 0
        while have < len(view):
            timed.until = time.monotonic() + IDLE_SECONDS
            count = request.rfile.readinto1(view[have:])
            if not count:  # the writer is gone
                return None
            have += count
        with self._changed:
            if name in self._expected:
                del self._expected[name]
                self._arrived[name] = body
                self._changed.notify_all()
        return 200

    def take(self, name: str, timeout: float) -> Any:
        """Return the body that was posted as `name`; None when it did not come in time."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._arrived, timeout)
            return self._arrived.pop(name, None)

    def forget(self, name: str) -> None:
        """Say that nobody waits for `name` any more."""
        with self._changed:
            self._expected.pop(name, None)
            self._arrived.pop(name, None)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def open_handoff(options: SGLangOptions) -> Handoff:
    """Return where states arrive; ConfigError where other machines could not bring them."""
    hosts = {urlsplit(url).hostname for url in options.urls}
    way = options.handoff
    if way == "auto":
        way = "files" if hosts <= LOCAL else "http"
    keep = options.max_bytes * 3 // 2  # memory used again is as large as the longest it had
    if way == "files":
        return FileHandoff(options.directory or spool.default_root(), keep)
    if options.receiver_host is None and not hosts <= LOCAL:
        raise ConfigError(
            "states are to come from other machines, and this one listens for none of them. Try: "
            "target.options.receiver_host=NAME, the name or address under which they reach it"
        )
    return HttpHandoff(
        options.receiver_host, options.receiver_port, keep, bind=options.receiver_bind
    )


def receiver_of(handoff: Handoff) -> str:
    """Return the HOST:PORT that states are posted to, or nothing."""
    return handoff.place.split("/")[0] if handoff.way == "http" else ""
