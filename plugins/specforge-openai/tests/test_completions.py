from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from specforge_openai.completions import Client, check_server, model_name
from specforge_openai.http_json import Refused, ServerDown

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.testing.toy import toy_tokenizer

BODY = {"prompt": [72, 105], "max_tokens": 4}


@pytest.fixture
def server(completions_server: Any) -> Any:
    return completions_server()


def refusal(server: Any, target: Path) -> str:
    with pytest.raises(ConfigError) as error:
        check_server(Client(server.url, 60.0), TargetConfig(path=str(target)), toy_tokenizer())
    return str(error.value)


def test_answer(server: Any) -> None:
    answer = Client(server.url, 60.0).complete(BODY)
    assert (answer.text, answer.finish_reason) == ("2 tokens", "stop")
    assert (answer.tokens, answer.end) == (None, None)
    assert server.bodies == [BODY]
    assert "Authorization" not in server.headers


@pytest.mark.parametrize("name", ["stop_reason", "matched_stop"])
def test_tokens_and_the_one_that_ended_it(server: Any, name: str) -> None:
    server.answer = lambda body: server.said("a", token_ids=[65, 7], **{name: 7})
    answer = Client(server.url, 60.0).complete(BODY)
    assert (answer.tokens, answer.end) == ((65, 7), 7)


def test_key_is_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECFORGE_API_KEY", "a-key")
    Client(server.url, 60.0).complete(BODY)
    assert server.headers["Authorization"] == "Bearer a-key"


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ((400, {"error": {"message": "too  long"}}), Refused, "HTTP 400: too long"),
        ((404, b"<html>"), Refused, "HTTP 404: <html>"),
        ((429, {"message": "busy"}), ServerDown, "HTTP 429: busy"),
        ((503, b""), ServerDown, "HTTP 503: no reason given"),
        ((200, b"<html>"), Refused, "/v1/completions is not JSON: '<html>'"),
        ((200, {"choices": []}), ServerDown, "no completion"),
        ((200, {"choices": [{"text": None, "finish_reason": "stop"}]}), ServerDown, "text is None"),
        ((200, {"choices": [{"text": 5, "finish_reason": "stop"}]}), ServerDown, "text is 5"),
        ((200, {"choices": [{"text": "a", "finish_reason": ["stop"]}]}), ServerDown, "ended with"),
        ((200, {"choices": [{"text": "a", "finish_reason": "abort"}]}), ServerDown, "'abort'"),
        (
            (200, b'{"choices": [{"text": "\\ud800", "finish_reason": "stop"}]}'),
            ServerDown,
            "Unicode",
        ),
        (
            (200, b'{"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [1e999]}]}'),
            ServerDown,
            "no completion",
        ),
        (
            (200, {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [1.5]}]}),
            ServerDown,
            "no completion",
        ),
        ((0, None), ServerDown, "RemoteDisconnected"),
    ],
)
def test_answers_that_are_none(server: Any, answer: Any, kind: Any, message: str) -> None:
    server.answer = lambda body: answer
    with pytest.raises(kind) as error:
        Client(server.url, 60.0).complete(BODY)
    assert message in str(error.value)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerDown, match="ConnectionRefusedError"):
            Client(url, 60.0).served()


def test_the_target_is_served(server: Any, toy_target: Path) -> None:
    server.model = {"id": "alias", "root": f"/elsewhere/{toy_target.name.upper()}"}
    target = TargetConfig(path=str(toy_target))
    served = check_server(Client(server.url, 60.0), target, toy_tokenizer())
    assert (served.id, served.positions) == ("alias", None)


def test_another_model(server: Any, toy_target: Path) -> None:
    server.model = {"id": "qwen", "root": "Qwen/Qwen3-8B"}
    message = refusal(server, toy_target)
    assert f"{server.url} serves 'qwen = Qwen/Qwen3-8B', the target is '{toy_target}'" in message
    assert f"--served-model-name {toy_target.name}" in message


def test_another_vocabulary(server: Any, toy_target: Path) -> None:
    server.model["id"] = toy_target.name
    server.answer = lambda body: server.said("Xello, world! 1234")
    assert (
        "as 'Xello, world! 1234': it does not echo prompts, or has another vocabulary"
        in refusal(server, toy_target)
    )


def test_prompts_of_token_ids_are_refused(server: Any, toy_target: Path) -> None:
    server.model["id"] = toy_target.name
    server.answer = lambda body: (422, {"error": "prompt must be a string"})
    message = refusal(server, toy_target)
    assert "refuses a prompt of token ids (HTTP 422: prompt must be a string)" in message
    assert "target.engine=transformers" in message


@pytest.mark.parametrize(
    "models",
    [
        *({}, [], "x", None),
        *({"id": "x", "max_model_len": n} for n in (float("inf"), -5, True, "512", 512.5, [512])),
    ],
)
def test_no_model_is_named(server: Any, toy_target: Path, models: Any) -> None:
    server.model = models
    assert "does not speak OpenAI's API (its /v1/models names no model" in refusal(
        server, toy_target
    )


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Toy-1B").mkdir()
    assert model_name("Qwen/Qwen3-8B") == "qwen3-8b"
    assert model_name("./Toy-1B/") == "toy-1b"
    assert model_name("Y" * 5000) == "y" * 5000  # no file can have that name
    assert model_name("/hub/models--Qwen--Qwen3-8B/snapshots/abc") == "qwen3-8b"
