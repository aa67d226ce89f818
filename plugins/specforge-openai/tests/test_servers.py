from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from specforge_core.data.servers import Servers

from specforge_core.config import DataConfig, RegenerateConfig, RunConfig, StrategyConfig
from specforge_core.config import TargetConfig as Target
from specforge_core.data import servers
from specforge_core.data.regenerate import regenerate
from specforge_core.data.respond import Chat, Task
from specforge_core.errors import ConfigError, DataError, RunError
from specforge_core.testing.toy import toy_tokenizer

TOKENIZER = toy_tokenizer()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(servers, "GATHER_SECONDS", 0.005)


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


def make_run(
    target: Path, *found: Any, data: dict[str, Any] | None = None, **options: Any
) -> RunConfig:
    settings = {"urls": [server.url for server in found], "max_new_tokens": 24, "batch_size": 4}
    return RunConfig(
        target=Target(path=str(target), device="cpu", dtype="float32"),
        strategy=StrategyConfig(name="none"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(**{**settings, **options}),
    )


def make_task(name: str, *questions: str) -> Task:
    turns = tuple(({"role": "user", "content": q},) for q in questions or ("Hi",))
    return Task(name, f"p.jsonl:{name}", turns, {}, 0)


def ask(run: RunConfig, *tasks: Task) -> dict[str, Chat]:
    groups = Servers(run, TOKENIZER).answer(tasks, set())
    return {chat.task.id: chat for group in groups for chat in group}


def answers(chat: Chat) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "assistant"]


def write(path: Path, count: int) -> Path:
    said = [[{"role": "user", "content": "x" * (1 + i)}] for i in range(count)]
    rows = [json.dumps({"id": str(i), "messages": said[i]}) + "\n" for i in range(count)]
    path.write_text("".join(rows))
    return path


def test_turns_are_asked_as_token_ids_with_every_setting(start: Any, toy_target: Path) -> None:
    server = start()
    found = ask(make_run(toy_target, server), make_task("a", "Hi", "And now?"))["a"]
    first, second = server.bodies
    assert TOKENIZER.decode(first["prompt"]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answers(found) == [f"{len(b['prompt'])} tokens" for b in (first, second)]
    assert f"{answers(found)[0]}<|im_end|>" in TOKENIZER.decode(second["prompt"])
    del first["prompt"]
    assert first == {
        "model": toy_target.name,
        "max_tokens": 24,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [TOKENIZER.eos_token_id],
        "skip_special_tokens": False,
    }


def test_draws_have_a_seed_of_their_own(start: Any, toy_target: Path) -> None:
    def seeds(**options: Any) -> list[int]:
        server = start()
        run = make_run(toy_target, server, temperature=0.5, batch_size=1, **options)
        ask(run, make_task("a", "Hi", "Hi"), make_task("b", "Hi"))
        return [body["seed"] for body in server.bodies]

    found = seeds()
    assert len(set(found)) == 3
    assert seeds() == found
    assert not set(seeds(seed=1)) & set(found)


def test_answers_that_do_not_end(start: Any, toy_target: Path) -> None:
    server = start(lambda body: server.said("cut", "length"))
    chat = ask(make_run(toy_target, server), make_task("a", "Hi", "Hi"))["a"]
    assert (chat.messages, chat.dropped, len(server.bodies)) == ([], "unfinished", 1)
    chat = ask(make_run(toy_target, server, keep_unfinished=True), make_task("a", "Hi", "Hi"))["a"]
    assert (answers(chat), chat.dropped) == (["cut", "cut"], None)


def test_text_of_the_end_token_is_cut_off(start: Any, toy_target: Path) -> None:
    server = start(lambda body: server.said("a <|im_start|> b<|im_end|>"))
    assert answers(ask(make_run(toy_target, server), make_task("a"))["a"]) == ["a <|im_start|> b"]
    server.answer = start(lambda body: server.said("<|im_end|>")).answer
    assert ask(make_run(toy_target, server), make_task("a"))["a"].dropped == "empty"


def test_the_shortest_context_bounds_prompt_and_answer(start: Any, toy_target: Path) -> None:
    one, two = start(), start()
    two.model["max_model_len"] = 100
    run = make_run(toy_target, one, two)
    found = ask(run, make_task("long", "x" * 90), make_task("short", "x" * 65))
    assert found["long"].dropped == "too long"
    ((body,),) = [bodies for bodies in (one.bodies, two.bodies) if bodies]
    assert body["max_tokens"] == 100 - len(body["prompt"]) < 24


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
    assert (report.num_written, report.num_tokens) == (10, 20)
    assert json.loads(output.read_text().splitlines()[-1])["id"] == "9"


def test_as_many_as_the_batch_size_are_in_flight(start: Any, toy_target: Path) -> None:
    barrier = threading.Barrier(6, timeout=60)

    def answer(body: dict[str, Any]) -> Any:
        barrier.wait()  # passes when six are there
        return completions_said("yes")

    found = [start(answer) for _ in range(3)]
    completions_said = found[0].said
    tasks = [make_task(str(i)) for i in range(18)]
    assert len(ask(make_run(toy_target, *found, batch_size=6), *tasks)) == 18
    assert [server.most for server in found] == [2, 2, 2]


def test_work_goes_to_the_server_with_the_fewest_outstanding(start: Any, toy_target: Path) -> None:
    def slowly(body: dict[str, Any]) -> Any:
        time.sleep(0.3)
        return slow.said("yes")

    slow, fast = start(slowly), start()
    tasks = [make_task(str(i)) for i in range(40)]
    assert len(ask(make_run(toy_target, slow, fast), *tasks)) == 40
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
    tasks = [make_task(str(i)) for i in range(12)]
    found = ask(make_run(toy_target, dying, other), *tasks)
    assert all(answers(found[str(i)]) for i in range(12))
    assert dying.bodies
    assert len(other.bodies) == 12
    assert capsys.readouterr().err.count(f"{dying.url} failed (") == 1


def test_a_server_that_never_answered_is_left_out(
    start: Any, toy_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, live = start(), start()
    dead.stop()
    assert answers(ask(make_run(toy_target, dead, live), make_task("a"))["a"])
    assert f"{dead.url} does not answer (ConnectionRefusedError" in capsys.readouterr().err


def test_no_server_answers(start: Any, toy_target: Path) -> None:
    dead = start()
    dead.stop()
    with pytest.raises(RunError) as error:
        Servers(make_run(toy_target, dead), TOKENIZER)
    message = str(error.value)
    assert f"no server of regenerate.urls answers:\n  {dead.url}: ConnectionRefused" in message
    assert f"start one that serves {toy_target}, then the same command" in message


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
    with pytest.raises(RunError, match=r"no server of regenerate\.urls answers"):
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
    assert answers(ask(make_run(toy_target, server), make_task("a"))["a"]) == ["yes"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"message": "longer than allowed"}), "HTTP 400: longer than allowed"),
        ((500, {"message": "a bug"}), "3 tries, the last one: HTTP 500: a bug"),
    ],
)
def test_a_prompt_that_no_server_answers(
    start: Any, toy_target: Path, answer: Any, reason: str
) -> None:
    def strict(body: dict[str, Any]) -> Any:
        return answer if "bad" in TOKENIZER.decode(body["prompt"]) else server.said("yes")

    server = start(strict)
    tasks = make_task("a", "bad"), make_task("b", "good")
    with pytest.raises(DataError) as error:
        ask(make_run(toy_target, server), *tasks)
    assert "p.jsonl:a: the server refuses the prompt of" in str(error.value)
    assert reason in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    found = ask(make_run(toy_target, server, data={"on_error": "skip"}), *tasks)
    assert (found["a"].dropped, answers(found["b"])) == ("refused by the server", ["yes"])


def test_a_server_of_another_model_is_refused_beside_a_right_one(
    start: Any, toy_target: Path
) -> None:
    right, wrong = start(), start()
    wrong.model["id"] = "other"
    with pytest.raises(ConfigError, match=f"{wrong.url} serves 'other', the target is"):
        Servers(make_run(toy_target, right, wrong), TOKENIZER)


def test_ends_are_those_of_the_models_files(start: Any, toy_target: Path, tmp_path: Path) -> None:
    server, target = start(), shutil.copytree(toy_target, tmp_path / toy_target.name)
    (named := target / "generation_config.json").write_text('{"eos_token_id": [5, 9], "top_k": 20}')
    eos = TOKENIZER.eos_token_id
    assert Servers(make_run(target, server), TOKENIZER).ends == [5, 9, eos]
    named.unlink()
    assert Servers(make_run(target, server), TOKENIZER).ends == [eos]
