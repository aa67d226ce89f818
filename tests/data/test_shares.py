"""Shares of prompts, answered in a thread by an engine that is written here, as servers are one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specforge_core.data.regenerate import origin_of
from specforge_core.data.shares import Shares, file_of, read_share
from specforge_core.errors import CaptureError
from specforge_core.types import Generated, GenerateOptions, Prompt

from .test_respond import TOKENIZER, Engine, make_run, say, tasks


class Slow(Engine):
    """Answers a batch only when the test has had the engine since the one before."""

    def __init__(self, target: Path, lock: threading.Lock, **replies: Generated) -> None:
        super().__init__(target, **replies)
        self.lock, self.mine, self.theirs = lock, threading.Event(), threading.Event()

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        assert self.lock.locked()
        self.mine.set()
        assert self.theirs.wait(20)
        self.theirs.clear()
        yield from super().generate(prompts, options)


def opened(target: Path, engine: Any, lock: threading.Lock, folder: Path) -> Shares:
    chats = tasks(("one",), ("two",), ("four",), ("three",), ("five",))
    run = make_run(target, data={"too_long": "raise"}, batch_size=2)
    return Shares(run, TOKENIZER, engine, lock, chats, folder)


def test_others_have_the_engine_between_two_batches(toy_target: Path, tmp_path: Path) -> None:
    lock = threading.Lock()
    engine = Slow(toy_target, lock)
    shares = opened(toy_target, engine, lock, tmp_path)
    shares.ask((1, 5))
    for _ in range(2):
        assert engine.mine.wait(20)
        engine.mine.clear()
        assert not shares.wait(0)
        engine.theirs.set()
        with lock:
            pass  # a capture
    assert shares.wait(20)
    rows = read_share(tmp_path / file_of((1, 5)))
    assert [row["id"] for row in rows] == ["1", "2", "3", "4"]  # however they came back
    assert [len(prompts) for prompts, _ in engine.calls] == [2, 2]
    shares.close(20)


def test_answers_that_are_not_kept_are_left_out_and_no_error(
    toy_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Generated(index=1, tokens=(), finished=False, refused="too rude")
    engine = Engine(toy_target, _0=say(0, "cut", finished=False), _1=refused)
    shares = opened(toy_target, engine, threading.Lock(), tmp_path)
    shares.ask((0, 2))
    shares.ask((2, 3))
    assert shares.wait(20)
    assert read_share(tmp_path / file_of((0, 2))) == []
    said = " ".join(capsys.readouterr().err.split())
    assert "0 of 2 prompts answered (1 refused by the engine, 1 unfinished)" in said
    assert [row["id"] for row in read_share(tmp_path / file_of((2, 3)))] == ["2"]
    shares.close(20)


def test_what_is_closed_writes_nothing_and_what_fails_is_raised_where_it_is_waited_for(
    toy_target: Path, tmp_path: Path
) -> None:
    lock = threading.Lock()
    engine = Slow(toy_target, lock)
    shares = opened(toy_target, engine, lock, tmp_path)
    shares.ask((0, 5))
    assert engine.mine.wait(20)
    shares.close(0)
    engine.theirs.set()
    shares.close(20)
    assert list(tmp_path.iterdir()) == []
    assert len(engine.calls) == 1
    other = opened(toy_target, Engine(toy_target, _3=say(9, "not asked")), lock, tmp_path)
    other.ask((3, 4))
    with pytest.raises(CaptureError, match="answered prompt 9, which it was not asked"):
        other.wait(20)
    other.close(20)


def test_what_is_there_is_kept_also_of_conversations_with_tools(
    toy_target: Path, tmp_path: Path
) -> None:
    question = {"role": "user", "content": "one"}
    read = [{"role": "assistant", "content": "look"}, {"role": "tool", "content": "3"}]
    (task,) = tasks(("one",))
    task = replace(task, turns=((question, *read),))
    run, engine = make_run(toy_target), Engine(toy_target)
    answer = {"role": "assistant", "content": "three"}
    for content, calls in (("one", 0), ("two", 1)):
        messages = [{**question, "content": content}, *read, answer]
        row = {"id": "0", "messages": messages, **origin_of(run, TOKENIZER)}
        (tmp_path / file_of((0, 1))).write_text(json.dumps(row) + "\n")
        shares = Shares(run, TOKENIZER, engine, threading.Lock(), [task], tmp_path)
        shares.ask((0, 1))
        assert shares.wait(20)
        assert len(engine.calls) == calls
        shares.close(20)
