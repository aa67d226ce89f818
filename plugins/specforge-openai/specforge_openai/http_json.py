"""Requests to a server that speaks JSON, and the two ways in which they fail."""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from .deadline import TimedReader

TOO_MANY_REQUESTS = 429
MAX_BYTES = 64 << 20  # of one answer: the longest are token ids


class ServerDown(Exception):
    """A server that could not do what it was asked now; another one, or later, may do."""


class Unreachable(ServerDown):
    """Nobody listens at a server's address, or nothing leads there."""


class Refused(Exception):
    """A server's answer that it cannot do what was asked, whichever server is asked."""


def request_json(
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    api_key: str | None = None,
    secrets: Sequence[str] = (),
) -> Any:
    """Return what is at `url` + `path`, or the answer to `body` there.

    `timeout` is in seconds, for all of it.  Raises ServerDown (Unreachable where nobody listens)
    and Refused, whose messages show neither the key nor any of the `secrets` in `body`, which a
    server may repeat.
    Safe to use from several threads at once: each request connects anew.
    """
    hidden = [*filter(None, (api_key, *secrets))]
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connection = kind(parts.netloc, timeout=timeout)
    until = time.monotonic() + timeout
    try:
        connection.connect()
    except OSError as exc:
        raise Unreachable(_told(f"{type(exc).__name__}: {exc}", hidden)) from exc
    try:
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, parts.path + path, text, headers)
        with _Response(connection.sock, until, method) as response:
            response.begin()
            status, raw = response.status, response.read(MAX_BYTES + 1)
            if response.length and len(raw) <= MAX_BYTES:  # it ended before its length
                raise http.client.IncompleteRead(raw, response.length)
    except (OSError, http.client.HTTPException, ValueError) as exc:  # ValueError: of a bad chunk
        raise ServerDown(_told(f"{type(exc).__name__}: {exc}", hidden)) from exc
    finally:
        connection.close()
    if len(raw) > MAX_BYTES:
        raise ServerDown(f"an answer of more than {MAX_BYTES:,} bytes")
    if 400 <= status < 500 and status != TOO_MANY_REQUESTS:
        raise Refused(f"HTTP {status}: {_told(_reason(raw), hidden)}")
    if status != 200:
        raise ServerDown(f"HTTP {status}: {_told(_reason(raw), hidden)}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as exc:
        told = _without(raw.decode("utf-8", "replace"), hidden)
        raise Refused(f"{path} is not JSON: {told[:80]!r}") from exc


class _Response(http.client.HTTPResponse):
    """An answer whose head and body end in time."""

    def __init__(self, sock: socket.socket, until: float, method: str) -> None:
        super().__init__(sock, method=method)
        self.fp.close()
        self.fp = io.BufferedReader(TimedReader(sock, until))


def _told(text: str, hidden: Sequence[str]) -> str:
    """Return what a server said in one line, without what is to be hidden."""
    return " ".join(_without(text, hidden).split())[:300]


def _without(text: str, hidden: Sequence[str]) -> str:
    for secret in hidden:
        text = text.replace(secret, "(key)")
    return text


def _reason(raw: bytes) -> str:
    try:
        error = json.loads(raw)
        error = error.get("error", error) if isinstance(error, dict) else error
        error = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        error = raw.decode("utf-8", "replace")
    return str(error).strip() or "no reason given"
