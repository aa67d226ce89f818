"""Servers side by side that are slow, fail, die or come back: nothing lost, nothing twice."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from specforge_openai.engine import OpenAIEngine

from specforge_core.errors import ConfigError, DataError, RunError

from .asking import TOKENIZER, ask, make_run, regenerate, served, text_of, write


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
    """One that does not answer its two gets no third of forty, of which four are in flight."""
    rest = threading.Event()

    def slowly(body: dict[str, Any]) -> Any:
        assert rest.wait(60)
        return slow.said("yes")

    def count(body: dict[str, Any]) -> Any:
        if len(fast.bodies) >= 38:
            rest.set()
        return fast.said("yes")

    slow, fast = start(slowly), start(count)
    assert len(ask(OpenAIEngine.load(served(toy_target, slow, fast)), *["Hi"] * 40)) == 40
    assert 1 <= len(slow.bodies) <= 2


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


def test_where_nobody_listens_nothing_is_waited_for(
    start: Any, toy_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless `patience` is given: a server may be starting."""
    dead = start()
    dead.stop()
    with pytest.raises(RunError) as error:
        OpenAIEngine.load(served(toy_target, dead, patience=None))
    told = str(error.value)
    assert f"answers:\n  {dead.url}: ConnectionRefusedError" in told
    assert f"Try: vllm serve {toy_target}, or python -m sglang" in told
    assert "target.options.patience=600" in told
    assert capsys.readouterr().err == ""
    with pytest.raises(RunError, match="none came back in 0 s"):
        OpenAIEngine.load(served(toy_target, dead, patience=0))
    assert "no other is left, waiting 0 s" in capsys.readouterr().err


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
    (found,) = ask(OpenAIEngine.load(served(toy_target, server, patience=None)), "Hi")
    assert text_of(found) == "2 tokens<|im_end|>"
    assert len(looks) > 3


def test_going_on_after_the_last_server_died(start: Any, toy_target: Path, tmp_path: Path) -> None:
    once = threading.Lock()

    def answer(body: dict[str, Any]) -> Any:
        if len(dying.bodies) < 6:
            return dying.echo(body)
        if once.acquire(blocking=False):  # of two that come together neither need be the sixth
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
