from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import (
    DataConfig,
    RegenerateConfig,
    RunConfig,
)
from specforge_core.errors import DataError
from specforge_core.testing.forked import python

from .prompted import ask, lines, make_run, regenerate, write

KILLED = """
import sys, time
from pathlib import Path
from specforge_core.config import RunConfig
from specforge_core.data.journal import Journal
from specforge_core.data.regenerate import regenerate
from specforge_core.strategy import Strategy
append, answered = Journal.append, []
def held(journal, rows):
    append(journal, rows)
    answered.append(rows)
    if len(answered) == 30:
        time.sleep(600)  # it does not end before it is killed
Journal.append = held
run = RunConfig.model_validate_json(sys.argv[1])
regenerate(run, Strategy.load("linear"), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def talker(toy_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a target that stops at one in eight tokens."""
    path = tmp_path_factory.mktemp("talker") / "toy-target"
    shutil.copytree(toy_target, path)
    stops = {"eos_token_id": list(range(2, 258, 8)), "pad_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(stops))
    return path


def test_rows_hold_the_targets_answers_and_the_prompts_fields(talker: Path, tmp_path: Path) -> None:
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "SOMEBODY ELSE WROTE THIS"},
        {"from": "human", "value": "And now?"},
    ]
    prompts = write(
        tmp_path / "p.jsonl",
        ask("a", "Hi", "Why?", category="chat", licence="MIT", model="of the prompt"),
        {"conversations": sharegpt},
    )
    output = tmp_path / "new" / "out.jsonl"

    report = regenerate(make_run(talker, prompts, keep_unfinished=True), output)

    by_id = {row["id"]: row for row in map(json.loads, lines(output))}
    assert set(by_id) == {"a", "p.jsonl:2"}
    row = by_id["a"]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    assert (row["category"], row["licence"], row["model"]) == ("chat", "MIT", "toy-target")
    assert row["sampling"]["temperature"] == 0.0
    assert row["sampling"]["max_new_tokens"] == 24
    roles = [m["role"] for m in by_id["p.jsonl:2"]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert "SOMEBODY" not in output.read_text()
    assert "conversations" not in by_id["p.jsonl:2"]
    assert f"{output}: 2 of 2 prompts answered; {report.num_tokens} tokens" in str(report)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_resuming_writes_what_one_run_would_have(
    talker: Path, tmp_path: Path, temperature: float
) -> None:
    """Whatever a killed process left: whole batches, half a batch, half a line."""
    rows = [ask(str(i), "word " * (1 + i * 5 % 7), "more") for i in range(10)]
    run = make_run(talker, write(tmp_path / "p.jsonl", *rows), temperature=temperature)
    whole = tmp_path / "whole.jsonl"
    report = regenerate(run, whole)
    dropped = whole.with_name("whole.jsonl.dropped")
    assert report.num_written + sum(report.dropped.values()) == 10
    assert report.num_written > 4
    assert report.dropped

    data = whole.read_bytes()
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        output = tmp_path / f"{fraction}.jsonl"
        output.write_bytes(data[: int(len(data) * fraction)])
        shutil.copy(dropped, output.with_name(output.name + ".dropped"))
        again = regenerate(run, output)
        assert lines(output) == lines(whole)
        assert lines(output.with_name(output.name + ".dropped")) == lines(dropped)
        assert again.num_written + again.num_before + sum(again.dropped.values()) == 10
        assert (again.num_tokens == 0) == (fraction == 1.0)


@pytest.mark.slow
def test_kill_9(talker: Path, tmp_path: Path) -> None:
    rows = [ask(str(i), "word " * (i % 7), "more", "and more") for i in range(80)]
    prompts = write(tmp_path / "p.jsonl", *rows)
    run = make_run(talker, prompts, max_new_tokens=64, temperature=1.0)
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for _ in range(2):
        before = output.stat().st_size if output.exists() else 0
        process = python(script, run.model_dump_json(), str(output), env=os.environ)
        while process.poll() is None and not (output.exists() and output.stat().st_size > before):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 2 <= len(lines(output)) <= 60
    regenerate(run, output)
    regenerate(run, whole)
    assert lines(output) == lines(whole)


def test_dropped_prompts_are_listed_with_the_reason(toy_target: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", ask("a", "Hi"), ask("b", "x" * 100), ask("c", "Hey"))
    output = tmp_path / "out.jsonl"
    run = make_run(toy_target, prompts, data={"max_length": 90}, max_new_tokens=2)
    report = regenerate(run, output)
    assert report.dropped == {"unfinished": 2, "too long": 1}
    assert "0 of 3 prompts answered, 1 dropped (too long), 2 dropped (unfinished)" in str(report)
    rows = map(json.loads, lines(tmp_path / "out.jsonl.dropped"))
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons == {"a": "unfinished", "b": "too long", "c": "unfinished"}
    assert not output.exists()
    tries = r"Try: data\.max_length=180, or .*, and regenerate\.max_new_tokens=4, or"
    with pytest.raises(DataError, match=rf"out\.jsonl\.dropped' says why for each\. {tries}"):
        report.check(run)
    with pytest.raises(DataError, match=r"says why for each$"):
        regenerate(run, output).check(run)


def test_output_of_another_run_is_refused(talker: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", ask("a", "Hi"), ask("b", "Hey"))
    output = tmp_path / "out.jsonl"
    regenerate(make_run(talker, prompts, keep_unfinished=True), output)
    before = output.read_text()

    other = tmp_path / "other-target"
    shutil.copytree(talker, other)
    cases = [
        (
            make_run(talker, prompts, keep_unfinished=True, temperature=0.7),
            "with sampling {'temperature': 0.0}, this run has {'temperature': 0.7}. Set it back",
        ),
        (make_run(other, prompts, keep_unfinished=True), "with model 'toy-target', this run has"),
    ]
    for run, message in cases:
        with pytest.raises(DataError) as error:
            regenerate(run, output)
        assert message in str(error.value)
        assert "try: -o OTHER.jsonl" in str(error.value)
    assert output.read_text() == before
    with pytest.raises(DataError, match="has rows without 'model', which regenerate did not write"):
        regenerate(make_run(talker, prompts), prompts)


def test_bad_prompts(talker: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    tool = {**ask("t", "Hi"), "tools": [{"type": "function", "function": {"name": "look"}}]}
    cases: list[tuple[list[dict[str, Any] | str], str]] = [
        (["{"], "p.jsonl:1 is not a line of JSON"),
        ([tool], "p.jsonl:1: the conversation has 'tools', which the target's chat template"),
        ([ask("a", "x"), ask("a", "y")], "p.jsonl:2 has the id 'a' of p.jsonl:1"),
        ([""], "no conversations in"),
    ]
    for rows, message in cases:
        with pytest.raises(DataError) as error:
            regenerate(make_run(talker, write(path, *rows)), output)
        assert message in str(error.value)
    run = make_run(talker, path)
    empty = run.model_copy(update={"regenerate": RegenerateConfig()})
    with pytest.raises(DataError, match=r"Try: regenerate\.prompts=\[PROMPTS\.jsonl\]"):
        regenerate(empty, output)
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]

    write(path, "{", tool, ask("a", "Hi"), ask("b", "Hey"), ask("c", "not reached"))
    data = {"on_error": "skip", "limit": 2}
    report = regenerate(make_run(talker, path, data=data, keep_unfinished=True), output)
    assert (report.num_prompts, sum(report.skipped.values())) == (2, 2)
    assert "2 bad lines skipped (1 not JSON, 1 not written by the chat template)" in str(report)
    assert [json.loads(line)["id"] for line in lines(output)] == ["a", "b"]


def with_files(run: RunConfig, *files: Path) -> RunConfig:
    settings = run.regenerate.model_copy(update={"prompts": files})
    return run.model_copy(update={"regenerate": settings})


def test_prompts_of_several_files_are_told_apart(talker: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    unnamed = {"messages": ask("", "Hi")["messages"]}
    first = write(tmp_path / "a" / "p.jsonl", unnamed, {**unnamed, "id": None}, ask("0", "one"))
    second = write(tmp_path / "b" / "p.jsonl", unnamed, {**unnamed, "id": 0}, ask("1", "two"))
    run = with_files(make_run(talker, first, keep_unfinished=True), first, second)
    output = tmp_path / "out.jsonl"
    report = regenerate(run, output)
    assert report.num_written == 6
    found = {json.loads(line)["id"] for line in lines(output)}
    assert found == {f"{first}:1", f"{first}:2", "0", f"{second}:1", f"{second}/0", "1"}
    again = regenerate(run, output)
    assert (again.num_written, again.num_before) == (0, 6)


def test_an_id_that_a_file_repeats_is_skipped(talker: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ask("a", "one"), ask("a", "two"), ask("b", "three"))
    output = tmp_path / "out.jsonl"
    run = make_run(talker, path, data={"on_error": "skip"}, keep_unfinished=True)
    report = regenerate(run, output)
    assert (report.num_written, report.skipped) == (2, {"repeated id": 1})
    rows = [json.loads(line) for line in lines(output)]
    assert [row["messages"][0]["content"] for row in rows] == ["one", "three"]


def test_fields_that_cannot_be_spelled_in_utf8_or_json(talker: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ask("a", "one", note="\ud800"), ask("\ud801", "two"))
    output = tmp_path / "out.jsonl"
    assert regenerate(make_run(talker, path, keep_unfinished=True), output).num_written == 2
    rows = [json.loads(line) for line in output.read_text("utf-8").rstrip("\n").split("\n")]
    assert {(row["id"], row.get("note")) for row in rows} == {("a", "\ud800"), ("\ud801", None)}
    assert regenerate(make_run(talker, path, keep_unfinished=True), output).num_before == 2


def test_a_whole_batch_of_prompts_that_are_too_long(talker: Path, tmp_path: Path) -> None:
    """They go first.  A retry leaves them alone, until longer ones are allowed."""
    long = [ask(f"long {i}", "x" * 100) for i in range(20)]
    prompts = write(tmp_path / "p.jsonl", *long)
    output, dropped = tmp_path / "out.jsonl", tmp_path / "out.jsonl.dropped"
    run = make_run(talker, prompts, data={"max_length": 90}, keep_unfinished=True)
    for _ in range(2):  # nothing is written, and nothing asked again
        report = regenerate(run, output)
        assert report.num_written == 0
        assert len(lines(dropped)) == 20
    assert (report.num_before, report.dropped) == (20, {})

    write(prompts, *long, ask("short", "Hi"))
    assert regenerate(run, output).num_written == 1
    more = run.model_copy(update={"data": DataConfig(max_length=200)})
    report = regenerate(more, output)
    assert (report.num_written, report.num_before) == (20, 1)
    assert len(lines(output)) == 21
    assert regenerate(more, output).num_written == 0


def test_dropped_prompts_of_another_sampling_go_with_their_output(
    talker: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "p.jsonl", ask("a", "x" * 100), ask("b", "Hi"))
    output = tmp_path / "out.jsonl"
    data = {"max_length": 90}
    regenerate(make_run(talker, prompts, data=data, keep_unfinished=True), output)
    output.unlink()
    other = make_run(talker, prompts, data=data, keep_unfinished=True, temperature=0.5)
    assert regenerate(other, output).num_written == 1


def test_a_foreign_file_in_the_place_of_the_dropped_is_left_alone(
    talker: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "p.jsonl", ask("a", "Hi"))
    notes = tmp_path / "out.jsonl.dropped"
    notes.write_text("dear diary\n")
    with pytest.raises(DataError, match="is no row of this command"):
        regenerate(make_run(talker, prompts), tmp_path / "out.jsonl")
    assert notes.read_text() == "dear diary\n"


@pytest.mark.parametrize("change", [{"max_length": value} for value in ("x", None, [], 1e999, {})])
def test_a_row_of_the_dropped_with_another_bound_is_done(
    talker: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    prompts = write(tmp_path / "p.jsonl", ask("a", "x" * 100))
    output, dropped = tmp_path / "out.jsonl", tmp_path / "out.jsonl.dropped"
    run = make_run(talker, prompts, data={"max_length": 90})
    regenerate(run, output)
    write(dropped, json.loads(dropped.read_text()) | change)
    assert regenerate(run, output).num_before == 1
