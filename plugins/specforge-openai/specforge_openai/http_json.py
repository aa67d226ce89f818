"""Requests to a server that speaks JSON, and the two ways in which they fail."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

TOO_MANY_REQUESTS = 429


class ServerDown(Exception):
    """A server that could not do what it was asked now; another one, or later, may do."""


class Refused(Exception):
    """A server's answer that it cannot do what was asked, whichever server is asked."""


def request_json(
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    api_key: str | None = None,
) -> Any:
    """Return what is at `url` + `path`, or the answer to `body` there.

    `timeout` is in seconds, between two signs of life.  Raises ServerDown and Refused.
    Safe to use from several threads at once: each request connects anew.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connection = kind(parts.netloc, timeout=timeout)
    try:
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, parts.path + path, text, headers)
        response = connection.getresponse()
        status, raw = response.status, response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise ServerDown(f"{type(exc).__name__}: {exc}") from exc
    finally:
        connection.close()
    told = raw.replace(api_key.encode(), b"(key)") if api_key else raw  # servers may echo it
    if 400 <= status < 500 and status != TOO_MANY_REQUESTS:
        raise Refused(f"HTTP {status}: {_reason(told)}")
    if status != 200:
        raise ServerDown(f"HTTP {status}: {_reason(told)}")
    try:
        return json.loads(raw)
    except ValueError as exc:
        raise Refused(f"{path} is not JSON: {told[:80]!r}") from exc


def _reason(raw: bytes) -> str:
    try:
        error = json.loads(raw)
        error = error.get("error", error) if isinstance(error, dict) else error
        error = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        error = raw.decode("utf-8", "replace")
    return " ".join(str(error).split())[:300] or "no reason given"
