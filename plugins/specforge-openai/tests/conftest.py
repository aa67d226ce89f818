"""A stand-in for servers that speak OpenAI's API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from specforge_openai import engine

from specforge_core.testing.toy import toy_tokenizer


class CompletionsServer:
    """OpenAI's /v1/models and /v1/completions over real HTTP; `answer` may be replaced.

    It echoes as a server does that decodes token ids, and answers with the prompt's length.
    """

    def __init__(self) -> None:
        self.model: dict[str, Any] = {"id": "toy-target", "max_model_len": 512}
        self.tokenizer = toy_tokenizer()
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = self.echo
        self.bodies: list[dict[str, Any]] = []  # of every request to complete but the probe
        self.headers: dict[str, str] = {}
        self.running = self.most = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, status: int, answer: Any) -> None:
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                self.reply(200, {"data": [server.model, {"id": "an adapter"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers = dict(self.headers)
                assert self.path == "/v1/completions"
                if body.get("echo"):
                    self.reply(*server.answer(body))
                    return
                with server.lock:
                    server.bodies.append(body)
                    server.running += 1
                    server.most = max(server.most, server.running)
                try:
                    status, answer = server.answer(body)
                finally:
                    with server.lock:
                        server.running -= 1
                if status == 0:  # hang up
                    self.close_connection = True
                else:
                    self.reply(status, answer)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def echo(self, body: dict[str, Any]) -> tuple[int, Any]:
        text = self.tokenizer.decode(body["prompt"]) if body.get("echo") else ""
        return self.said(f"{text}{len(body['prompt'])} tokens")

    @staticmethod
    def said(text: str, reason: str | None = "stop", **more: Any) -> tuple[int, Any]:
        return 200, {"choices": [{"index": 0, "text": text, "finish_reason": reason, **more}]}

    def stop(self) -> None:
        """Answer no one from now on."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def completions_server() -> Iterator[Callable[[], CompletionsServer]]:
    """Return a function that starts a server of completions."""
    started: list[CompletionsServer] = []

    def start() -> CompletionsServer:
        started.append(CompletionsServer())
        return started[-1]

    yield start
    for server in started:
        if server.thread.is_alive():
            server.stop()


@pytest.fixture
def start(
    completions_server: Callable[[], CompletionsServer],
    toy_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., CompletionsServer]:
    """Return a function that starts a server of the toy target, which may answer otherwise."""
    monkeypatch.setattr(engine, "PAUSE_SECONDS", 0.0)

    def begin(answer: Any = None) -> CompletionsServer:
        server = completions_server()
        server.model["id"] = toy_target.name
        if answer is not None:
            echo = server.answer
            server.answer = lambda body: (echo if body.get("echo") else answer)(body)
        return server

    return begin
