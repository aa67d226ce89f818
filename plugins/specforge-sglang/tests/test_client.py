"""What a server's answers mean: done, down, or refused."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from specforge_openai.http_json import Refused, ServerDown
from specforge_sglang.client import Client, check_server
from specforge_sglang_capture.ask import Ask

from specforge_core.errors import CaptureError

ASK = Ask("x", "http", "here:1/the-token", (0,), "none")


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
    """A reason that repeats the request's id shows no token: error messages get into logs."""
    with pytest.raises(Refused, match=r"^HTTP 400: the input is longer than 500 tokens") as error:
        Client(shared().url, 20.0).prefill([1] * 501, ASK)
    assert "specforge|2|http|here:1/(key)|0|none||x" in str(error.value)


def test_something_else_at_the_url_is_no_server(shared: Any) -> None:
    server = shared(info={"version": "2.0"})
    check_server(Client(server.url, 20.0))
    with pytest.raises(CaptureError, match=r"0\.4\.1\.post2, which is older than 0\.5\.14"):
        check_server(Client(shared(info={"version": "0.4.1.post2"}).url, 5.0))


@pytest.mark.parametrize(
    "info",
    [
        *({"version": value} for value in ("0.5.\u00b2", "x" * 10_000, None, [])),
        *({"chunked_prefill_size": value} for value in ("x", [1], {"a": 1})),
        *({"pp_size": value} for value in ("x", [2])),
    ],
)
def test_a_server_that_tells_of_itself_in_another_way(shared: Any, info: dict[str, Any]) -> None:
    with pytest.raises(CaptureError) as error:
        check_server(Client(shared(info=info).url, 5.0))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("meta", [None, [], "x", 5, str(ASK)])
def test_an_answer_whose_meta_info_is_another(monkeypatch: pytest.MonkeyPatch, meta: Any) -> None:
    monkeypatch.setattr(Client, "_request", lambda *_: {"meta_info": meta})
    message = r"that is not SGLang's: .*Check target\.options\.urls"
    with pytest.raises(CaptureError, match=message) as error:
        Client("http://here", 5.0).prefill([1], ASK)
    assert "the-token" not in str(error.value)


def test_a_cpu_server_needs_no_flag_about_graphs(shared: Any) -> None:
    server = shared(info={"device": "cpu", "disable_cuda_graph": False})
    check_server(Client(server.url, 20.0))
