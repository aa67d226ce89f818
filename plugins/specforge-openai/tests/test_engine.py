"""Answers of servers over real HTTP: nothing lost, nothing twice, nothing of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from specforge_openai.engine import OpenAIEngine
from specforge_openai.options import OpenAIOptions, read_options

from specforge_core.config import (
    TargetConfig as Target,
)
from specforge_core.errors import CaptureError, ConfigError, SpecForgeError
from specforge_core.process import describe
from specforge_core.records import MASK
from specforge_core.types import CaptureSpec

from .asking import EOS, TOKENIZER, ask, make_prompts, make_run, regenerate, served, text_of, write


def test_prompts_are_asked_as_token_ids_with_every_setting(start: Any, toy_target: Path) -> None:
    server = start()
    (answer,) = ask(OpenAIEngine.load(served(toy_target, server)), "Hi")
    assert (text_of(answer), answer.finished) == ("2 tokens<|im_end|>", True)
    assert server.bodies == [
        {
            "model": toy_target.name,
            "prompt": TOKENIZER("Hi")["input_ids"],
            "max_tokens": 24,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": [EOS],
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
    ]


def test_draws_have_a_seed_of_their_own(start: Any, toy_target: Path) -> None:
    def seeds(*texts: str, **options: Any) -> list[int]:
        server = start()
        engine = OpenAIEngine.load(served(toy_target, server))
        ask(engine, *texts, temperature=0.5, batch_size=1, **options)
        return [body["seed"] for body in server.bodies]

    found = seeds("Hi", "Hi", "Hi")
    assert len(set(found)) == 3
    assert seeds("a", "b", "c") == found
    assert not set(seeds("Hi", "Hi", "Hi", seed=1)) & set(found)


@pytest.mark.parametrize(
    ("said", "eos", "tokens", "finished"),
    [
        (("ab", "length", {}), {EOS}, "ab", False),
        (("ab", "stop", {}), {EOS}, "ab<|im_end|>", True),
        (("ab<|im_end|>", "stop", {}), {EOS}, "ab<|im_end|>", True),  # some servers leave it
        (("a<|im_start|>", "stop", {}), {EOS}, "a<|im_start|><|im_end|>", True),
        (("ab", "stop", {"stop_reason": 7}), {EOS, 7}, [*TOKENIZER("ab")["input_ids"], 7], True),
        (("ab", "stop", {"matched_stop": 7}), {EOS, 7}, [*TOKENIZER("ab")["input_ids"], 7], True),
        (("ab", "stop", {}), {EOS, 7}, "ab", True),  # nobody says which one it was
        (("other", "stop", {"token_ids": [5, 6, EOS]}), {EOS}, [5, 6, EOS], True),
        (("other", "length", {"token_ids": [5, 6]}), {EOS}, [5, 6], False),
    ],
)
def test_tokens_of_answers(
    start: Any, toy_target: Path, said: Any, eos: set[int], tokens: Any, finished: bool
) -> None:
    text, reason, more = said
    server = start(lambda body: server.said(text, reason, **more))
    engine = OpenAIEngine.load(served(toy_target, server))
    (answer,) = ask(engine, "Hi", eos=frozenset(eos))
    expected = TOKENIZER(tokens)["input_ids"] if isinstance(tokens, str) else tokens
    assert (list(answer.tokens), answer.finished) == (expected, finished)
    assert answer.retokenized == ("token_ids" not in more)


def test_the_shortest_context_bounds_prompt_and_answer(start: Any, toy_target: Path) -> None:
    one, two = start(), start()
    two.model["max_model_len"] = 100
    engine = OpenAIEngine.load(served(toy_target, one, two))
    assert engine.info.config["max_position_embeddings"] == 100
    ask(engine, "x" * 90)
    ((body,),) = [bodies for bodies in (one.bodies, two.bodies) if bodies]
    assert body["max_tokens"] == 100 - len(body["prompt"]) < 24


def test_it_only_generates(start: Any, toy_target: Path) -> None:
    engine = OpenAIEngine.load(served(toy_target, start()))
    spec = CaptureSpec(layers=(0,), fields={})
    assert not engine.supports(spec)
    with pytest.raises(CaptureError, match=r"only generates.*target.engine=transformers.*sglang"):
        engine.capture(make_prompts("Hi"), spec)


@pytest.mark.parametrize(
    "url",
    [
        *("http://h", "https://h:443/v1/", "http://a.b-c_d.:65535", "http://127.0.0.1:00080"),
        *("http://[::1]:1", "http://h/a/%7Eb/v1"),
    ],
)
def test_addresses(toy_target: Path, url: str) -> None:
    target = Target(path=str(toy_target), engine="openai", options={"urls": [url]})
    (found,) = read_options(target, OpenAIOptions).urls
    assert url.startswith(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"target\.options\.urls: required, and missing\. Try: target\.options\.urls="),
        ({"urls": []}, "at least 1 item"),
        ({"urls": ["host:1"]}, "'host:1' is no address of a server"),
        ({"urls": ["ftp://me:pass@a:1/?key=abc"]}, "'a:1/' is no address of a server"),
        ({"urls": ["me:pass@a"]}, "'a' is no address of a server"),
        *(
            ({"urls": [url]}, "is no address of a server, such as http://127.0.0.1:30000")
            for url in (
                *("http://", "http://:80", "http:///x", "http://h:abc", "http://h:1;x"),
                *(
                    "http://h:0",
                    "http://h:-1",
                    "http://h:65536",
                    "http://h:99999",
                    "http://h:\u0663",
                ),
                *("http://a b", "http://a\nb", "http://a..b", f"http://{'a' * 64}", "http://\xe9"),
                *("http://\ud800", "http://*", "http://h/\xe9", "http://h/a b", "http://h/#x"),
                *("http://h/\0", "http://h\\x", "HTTP://h", "x" * 10_000),
            )
        ),
        ({"urls": ["http://a"], "python": "x"}, r"python: unknown key .* 'target.options=\{urls"),
        ({"urls": ["http://me:pass@a:1"]}, "the address of a holds a user, a password or a query"),
        ({"url": "https://a/?token=abc"}, "Try: export SPECFORGE_API_KEY=KEY"),
        ({"urls": ["http://a"], "api_key": "x"}, "Try: export SPECFORGE_API_KEY=KEY"),
    ],
)
def test_options_that_are_wrong(toy_target: Path, options: dict[str, Any], message: str) -> None:
    target = Target(path=str(toy_target), engine="openai", options=options)
    with pytest.raises(ConfigError, match=message):
        OpenAIEngine.load(target)


@pytest.mark.parametrize("more", [{}, {"token_ids": [65] * 50}])
def test_more_than_was_asked_for(
    start: Any, toy_target: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    server = start(lambda body: server.said("a" * (10 if more else 100_000), **more))
    prompts = (write(tmp_path / "p.jsonl", 1),)
    with pytest.raises(CaptureError, match=r"and was asked for 24( tokens)? at most"):
        regenerate(make_run(toy_target, server, prompts=prompts), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_the_key_is_in_no_file_and_no_line(
    start: Any,
    toy_target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_error: str,
) -> None:
    key = "a/very-secret/key"
    monkeypatch.setenv("SPECFORGE_API_KEY", key)

    def repeat(body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["prompt"]) % 2:
            return 500, {"error": {"message": f"wrong: Bearer {key}"}}
        return 400, f'{{"error": "{key.replace("/", chr(92) + "/")}"}}'.encode()

    server, down = start(repeat), start(lambda body: (0, None))
    down.model["id"] = key
    down.answer = lambda body: (503, {"message": f"busy with {key}"})
    prompts, said = (write(tmp_path / "p.jsonl", 4),), ""
    for servers in ((server,), (server, down)):
        run = make_run(toy_target, *servers, prompts=prompts, data={"on_error": on_error})
        try:
            said += str(regenerate(run, tmp_path / "out.jsonl"))
        except SpecForgeError as exc:
            said += describe(exc)[0]
    said += "".join(capsys.readouterr())
    assert server.headers["Authorization"] == f"Bearer {key}"
    # whichever prompt's refusal came first; "Bearer KEY" is masked whole
    assert "(key)" in said or MASK in said or "refused by the engine" in said
    assert key not in said
    assert not [path for path in tmp_path.iterdir() if key in path.read_text()]
