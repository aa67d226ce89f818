"""JSON over real HTTP, and what its failures are called."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from specforge_openai import http_json
from specforge_openai.http_json import Refused, ServerDown, request_json

ANSWERS = {
    "/down": (503, b'{"error": {"message": "out of  memory"}}'),
    "/busy": (429, b"slowly"),
    "/wrong": (400, b'{"message": "too long"}'),
    "/page": (200, b"<html>"),
}


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: str | None) -> None:
            path = self.path.removeprefix("/base")
            said = {"path": self.path, "body": body, "key": self.headers.get("Authorization")}
            status, raw = ANSWERS.get(path, (200, json.dumps(said).encode()))
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/base"
    server.shutdown()
    server.server_close()


def test_a_body_makes_it_a_post(url: str) -> None:
    assert request_json(url, "/x", timeout=20) == {"path": "/base/x", "body": None, "key": None}
    answer = request_json(url, "/x", {"a": [1]}, timeout=20, api_key="secret")
    assert answer == {"path": "/base/x", "body": '{"a": [1]}', "key": "Bearer secret"}


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/down", ServerDown, "HTTP 503: out of memory"),
        ("/busy", ServerDown, "HTTP 429: slowly"),
        ("/wrong", Refused, "HTTP 400: too long"),
        ("/page", Refused, "/page is not JSON: '<html>'"),
    ],
)
def test_failures(url: str, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        request_json(url, path, timeout=20)
    assert str(found.value) == message


def test_a_server_that_is_not_there_or_silent_is_down() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerDown, match="ConnectionRefusedError"):
            request_json(url, "/", timeout=20)
        silent.listen()
        with pytest.raises(ServerDown, match="TimeoutError"):
            request_json(url, "/", timeout=0.2)


def test_a_key_that_a_server_repeats_is_not_shown(url: str) -> None:
    with pytest.raises(Refused, match=r"^HTTP 400: too \(key\)$"):
        request_json(url, "/wrong", timeout=20, api_key="long")


def trickle(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        sock.sendall(b" ")
        time.sleep(0.05)


def trickle_in_the_head(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        sock.sendall(b"a")
        time.sleep(0.05)


def endless(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        sock.sendall(b" " * 65536)


def deep(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000)


def chunk_of_less_than_nothing(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n")


def no_http(sock: socket.socket) -> None:
    sock.sendall(b"Bearer a/key\x1b[2J\r\n\r\n")


def repeats_the_key(sock: socket.socket) -> None:
    body = b'{"error": "no a\\/key"}'
    sock.sendall(b"HTTP/1.1 500 a/key\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def in_chunks(sock: socket.socket) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    sock.sendall(head + b"2\r\n[1\r\n1\r\n]\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        (trickle, ServerDown, "TimeoutError: timed out"),
        (trickle_in_the_head, ServerDown, "TimeoutError: timed out"),
        (endless, ServerDown, "an answer of more than 100,000 bytes"),
        (deep, Refused, "/x is not JSON: '[[["),
        (chunk_of_less_than_nothing, ServerDown, "ValueError: "),
        (no_http, ServerDown, "BadStatusLine: Bearer (key)"),
        (repeats_the_key, ServerDown, "HTTP 500: no (key)"),
        (in_chunks, None, None),
    ],
)
def test_an_answer_ends_in_time_and_in_bounds(
    monkeypatch: pytest.MonkeyPatch,
    behave: Callable[[socket.socket], None],
    error: type[Exception] | None,
    message: str | None,
) -> None:
    monkeypatch.setattr(http_json, "MAX_BYTES", 100_000)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            sock, _ = server.accept()
            with sock, suppress(OSError):
                sock.recv(65536)
                behave(sock)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        if error is None:
            assert request_json(url, "/x", timeout=20) == [1]
        else:
            # the others' answers come, however busy the machine is
            seconds = 1 if "timed out" in str(message) else 20
            with pytest.raises(error) as found:
                request_json(url, "/x", timeout=seconds, api_key="a/key")
            assert str(message) in str(found.value)
            assert "a/key" not in str(found.value)
        assert time.monotonic() < began + 20  # what trickles would take 50 s, or not end
        thread.join()
