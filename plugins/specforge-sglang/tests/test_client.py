"""What a server's answers mean: done, down, or refused."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from specforge_openai.http_json import Refused, ServerDown
from specforge_sglang.client import Client, check_server

from specforge_core.errors import CaptureError


def test_nobody_listening_is_down() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(ServerDown, match="refused"):
            Client(f"http://127.0.0.1:{port}", 2.0).get("/server_info")


def test_a_server_that_hangs_is_down() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
        with pytest.raises(ServerDown, match="timed out"):
            client.get("/server_info")


def test_a_request_it_cannot_do_is_refused_with_its_reason(shared: Any) -> None:
    with pytest.raises(Refused, match=r"^HTTP 400: the input is longer than 500 tokens"):
        Client(shared().url, 5.0).prefill([1] * 501, "x")


def test_something_else_at_the_url_is_no_server(shared: Any) -> None:
    server = shared(info={"version": "2.0"})
    check_server(Client(server.url, 5.0))
    with pytest.raises(CaptureError, match=r"0\.4\.1\.post2, which is older than 0\.5\.14"):
        check_server(Client(shared(info={"version": "0.4.1.post2"}).url, 5.0))


def test_a_cpu_server_needs_no_flag_about_graphs(shared: Any) -> None:
    server = shared(info={"device": "cpu", "disable_cuda_graph": False})
    check_server(Client(server.url, 5.0))
