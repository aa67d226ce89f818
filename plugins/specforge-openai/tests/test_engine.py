"""Answers of servers over real HTTP: nothing lost, nothing twice, nothing of another model."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_openai import engine as engine_module
from specforge_openai.engine import OpenAIEngine
from specforge_openai.options import OpenAIOptions, read_options

from specforge_core.config import (
    DataConfig,
    RegenerateConfig,
    RunConfig,
    StrategyConfig,
    TargetConfig as Target,
)
from specforge_core.data.regenerate import RegenerateReport, regenerate as run_regenerate
from specforge_core.errors import CaptureError, ConfigError, DataError, RunError, SpecForgeError
from specforge_core.process import describe
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import toy_tokenizer
from specforge_core.types import CaptureSpec, Generated, GenerateOptions, Prompt

TOKENIZER = toy_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def start(completions_server: Any, toy_target: Path) -> Any:
    def begin(answer: Any = None) -> Any:
        server = completions_server()
        server.model["id"] = toy_target.name
        if answer is not None:
            echo = server.answer
            server.answer = lambda body: (echo if body.get("echo") else answer)(body)
        return server

    return begin


def served(target: Path, *found: Any, **options: Any) -> Target:
    given = {"urls": [server.url for server in found], "patience": 0.0, **options}
    return Target(path=str(target), device="cpu", dtype="float32", engine="openai", options=given)


def make_prompts(*texts: str) -> list[Prompt]:
    rows = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in texts]
    return [
        Prompt(index=i, input_ids=row, loss_mask=torch.zeros_like(row))
        for i, row in enumerate(rows)
    ]


def ask(engine: OpenAIEngine, *texts: str, **options: Any) -> list[Generated]:
    settings = {"max_new_tokens": 24, "eos": frozenset({EOS}), "batch_size": 4, **options}
    found = engine.generate(make_prompts(*texts), GenerateOptions(**settings))
    return sorted(found, key=lambda answer: answer.index)


def text_of(answer: Generated) -> str:
    return str(TOKENIZER.decode(list(answer.tokens)))


def make_run(
    target: Path,
    *found: Any,
    data: dict[str, Any] | None = None,
    patience: float = 0.0,
    **options: Any,
) -> RunConfig:
    return RunConfig(
        target=served(target, *found, patience=patience),
        strategy=StrategyConfig(name="linear"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(**{"max_new_tokens": 24, "batch_size": 4, **options}),
    )


def regenerate(run: RunConfig, output: Path) -> RegenerateReport:
    return run_regenerate(run, Strategy.load("linear"), output)


def write(path: Path, count: int) -> Path:
    said = [[{"role": "user", "content": "x" * (1 + i)}] for i in range(count)]
    rows = [json.dumps({"id": str(i), "messages": said[i]}) + "\n" for i in range(count)]
    path.write_text("".join(rows))
    return path


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


def test_no_answer_waits_for_a_slower_one(start: Any, toy_target: Path, tmp_path: Path) -> None:
    """One of four in flight never ends, until all others are in the file."""
    output, slow = tmp_path / "out.jsonl", threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if "xxxxxxxxxx" in TOKENIZER.decode(body["prompt"]):
            assert slow.wait(60)
        return server.said("yes")

    server = start(answer)

    def watch() -> None:
        while not (output.exists() and len(output.read_text().splitlines()) == 9):
            time.sleep(0.01)
        slow.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run = make_run(toy_target, server, prompts=(write(tmp_path / "p.jsonl", 10),))
    report = regenerate(run, output)
    assert (report.num_written, report.num_tokens) == (10, 40)  # three letters and the end
    assert json.loads(output.read_text().splitlines()[-1])["id"] == "9"


def test_as_many_as_the_batch_size_are_in_flight(start: Any, toy_target: Path) -> None:
    barrier = threading.Barrier(6, timeout=60)

    def answer(body: dict[str, Any]) -> Any:
        barrier.wait()  # passes when six are there
        return completions_said("yes")

    found = [start(answer) for _ in range(3)]
    completions_said = found[0].said
    engine = OpenAIEngine.load(served(toy_target, *found))
    assert len(ask(engine, *["Hi"] * 18, batch_size=6)) == 18
    assert [server.most for server in found] == [2, 2, 2]


def test_work_goes_to_the_server_with_the_fewest_outstanding(start: Any, toy_target: Path) -> None:
    def slowly(body: dict[str, Any]) -> Any:
        time.sleep(0.3)
        return slow.said("yes")

    slow, fast = start(slowly), start()
    assert len(ask(OpenAIEngine.load(served(toy_target, slow, fast)), *["Hi"] * 40)) == 40
    assert len(slow.bodies) < len(fast.bodies)


def test_a_server_that_dies_gives_its_work_to_the_others(
    start: Any, toy_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = threading.Lock()

    def die(body: dict[str, Any]) -> Any:
        if once.acquire(blocking=False):
            threading.Thread(target=dying.stop).start()
        dying.thread.join()
        return 0, None

    dying, other = start(die), start()
    found = ask(OpenAIEngine.load(served(toy_target, dying, other)), *["Hi"] * 12)
    assert [text_of(answer) for answer in found] == ["2 tokens<|im_end|>"] * 12
    assert dying.bodies
    assert len(other.bodies) == 12
    assert capsys.readouterr().err.count(f"{dying.url} failed (") == 1


def test_a_server_that_never_answered_is_left_out(
    start: Any, toy_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, live = start(), start()
    dead.stop()
    (answer,) = ask(OpenAIEngine.load(served(toy_target, dead, live)), "Hi")
    assert answer.finished
    assert f"{dead.url} failed (ConnectionRefusedError" in capsys.readouterr().err


def test_no_server_answers(start: Any, toy_target: Path) -> None:
    dead = start()
    dead.stop()
    with pytest.raises(RunError) as error:
        OpenAIEngine.load(served(toy_target, dead))
    message = str(error.value)
    assert f"none came back in 0 s:\n  {dead.url}: ConnectionRefused" in message
    assert "start them again, then the same command" in message


def test_a_server_that_comes_back_is_used_again(
    start: Any, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_openai.pool.RETRY_SECONDS", 0.05)
    answer, looks = start().answer, []

    def away(body: dict[str, Any]) -> Any:  # for the first looks
        looks.append(body)
        return (503, b"") if len(looks) < 3 else answer(body)

    server = start()
    server.answer = away
    (found,) = ask(OpenAIEngine.load(served(toy_target, server, patience=60.0)), "Hi")
    assert text_of(found) == "2 tokens<|im_end|>"
    assert len(looks) > 3


def test_going_on_after_the_last_server_died(start: Any, toy_target: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if len(dying.bodies) < 6:
            return dying.echo(body)
        if len(dying.bodies) == 6:
            threading.Thread(target=dying.stop).start()
        dying.thread.join()
        return 0, None

    dying = start(answer)
    prompts = (write(tmp_path / "p.jsonl", 10),)
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(RunError, match="no server of the target engine can be used"):
        regenerate(make_run(toy_target, dying, prompts=prompts), output)
    kept = output.read_text().splitlines()
    assert 0 < len(kept) <= 6

    server = start()
    report = regenerate(make_run(toy_target, server, prompts=prompts), output)
    assert (report.num_before, report.num_written) == (len(kept), 10 - len(kept))
    assert len(server.bodies) == 10 - len(kept)
    regenerate(make_run(toy_target, server, prompts=prompts), whole)
    assert sorted(output.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    server.stop()
    assert regenerate(make_run(toy_target, server, prompts=prompts), output).num_before == 10


def test_a_failure_of_a_server_that_is_up_is_tried_again(start: Any, toy_target: Path) -> None:
    failures = [(500, {"message": "out of memory"}), (0, None)]
    server = start(lambda body: failures.pop() if failures else server.said("yes"))
    (answer,) = ask(OpenAIEngine.load(served(toy_target, server)), "Hi")
    assert text_of(answer) == "yes<|im_end|>"
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"message": "longer than allowed"}), "HTTP 400: longer than allowed"),
        ((500, {"message": "a bug"}), "3 tries, the last one: HTTP 500: a bug"),
    ],
)
def test_a_prompt_that_no_server_answers(
    start: Any, toy_target: Path, tmp_path: Path, answer: Any, reason: str
) -> None:
    def strict(body: dict[str, Any]) -> Any:
        return answer if "xxx" in TOKENIZER.decode(body["prompt"]) else server.said("yes")

    server = start(strict)
    prompts = (write(tmp_path / "p.jsonl", 3),)
    with pytest.raises(DataError) as error:
        regenerate(make_run(toy_target, server, prompts=prompts), tmp_path / "out.jsonl")
    assert "p.jsonl:3: target.engine=openai refuses the prompt of" in str(error.value)
    assert reason in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    run = make_run(toy_target, server, prompts=prompts, data={"on_error": "skip"})
    report = regenerate(run, tmp_path / "out.jsonl")
    assert report.dropped == {"refused by the engine": 1}
    assert report.num_before + report.num_written == 2


def test_a_server_of_another_model_is_refused_beside_a_right_one(
    start: Any, toy_target: Path
) -> None:
    right, wrong = start(), start()
    wrong.model["id"] = "other"
    with pytest.raises(ConfigError, match=f"{wrong.url} serves 'other', the target is"):
        OpenAIEngine.load(served(toy_target, right, wrong))


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
    assert "(key)" in said or "refused by the engine" in said
    assert key not in said
    assert not [path for path in tmp_path.iterdir() if key in path.read_text()]
