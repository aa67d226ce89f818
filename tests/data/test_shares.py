"""Shares of prompts, answered in a thread by an engine that is written here, as servers are one."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.config import TargetConfig
from specforge_core.data import shares as module
from specforge_core.data.regenerate import origin_of
from specforge_core.data.shares import Shares, file_of, read_share, share_text
from specforge_core.errors import CaptureError
from specforge_core.files import temporary
from specforge_core.locks import InTurn
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec, Generated, GenerateOptions, Prompt

from .test_respond import TOKENIZER, Engine, make_run, say, tasks


class Slow(Engine):
    """Answers a batch only when the test has had the engine since the one before."""

    def __init__(self, target: Path, lock: InTurn, **replies: Generated) -> None:
        super().__init__(target, **replies)
        self.lock, self.mine, self.theirs = lock, threading.Event(), threading.Event()

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        assert self.lock._asked
        self.mine.set()
        assert self.theirs.wait(20)
        self.theirs.clear()
        yield from super().generate(prompts, options)


def opened(target: Path, engine: Any, lock: InTurn, folder: Path) -> Shares:
    chats = tasks(("one",), ("two",), ("four",), ("three",), ("five",))
    run = make_run(target, data={"too_long": "raise"}, batch_size=2)
    return Shares(run, TOKENIZER, engine, lock, chats, folder)


def test_others_have_the_engine_between_two_batches(toy_target: Path, tmp_path: Path) -> None:
    lock = InTurn()
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


class Beside(Engine):
    """Answers while others call it, too."""

    answers_beside = True


def test_nobody_waits_for_an_engine_that_answers_beside(toy_target: Path, tmp_path: Path) -> None:
    lock = InTurn()
    shares = opened(toy_target, Beside(toy_target), lock, tmp_path)
    with lock:  # a capture that is under way
        shares.ask((0, 5))
        assert shares.wait(20)
    assert len(read_share(tmp_path / file_of((0, 5)))) == 5
    shares.close(20)


def test_a_batch_of_answers_gives_way_between_two_tokens(
    toy_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is answered as if nothing had been."""
    target = TargetConfig(path=str(toy_target), dtype="float32", device="cpu")
    engine = TransformersEngine.load(target, torch.device("cpu"))
    settings = {"keep_unfinished": True, "max_new_tokens": 40, "batch_size": 2}
    run = make_run(toy_target, **settings)
    chats, spec = tasks(("one",), ("two two",)), CaptureSpec(layers=(1,), fields={})
    ids = torch.arange(9)
    prompt = Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))
    state = next(engine.capture([prompt], spec)).hidden_states[1]
    taken = 0

    def asked_for(*_: object) -> None:
        """Before a token beside captures: wait until the next one is asked for."""
        until = time.monotonic() + 20
        answers = threading.current_thread() is not threading.main_thread()
        while seconds == 0.0 and answers and not lock.waiting() and time.monotonic() < until:
            time.sleep(0.001)

    engine.model.register_forward_pre_hook(asked_for)
    for place, seconds in (("alone", 60.0), ("beside", 0.0)):
        monkeypatch.setattr(module, "SLICE_SECONDS", seconds)
        lock = InTurn()
        shares = Shares(run, TOKENIZER, engine, lock, chats, tmp_path / place)
        shares.ask((0, 2))
        while seconds == 0.0 and not shares.wait(0):
            with lock:
                taken += 1
                assert torch.equal(next(engine.capture([prompt], spec)).hidden_states[1], state)
        assert shares.wait(20)
        shares.close(20)
    assert taken > 30  # in one batch, of 40 tokens
    alone, beside = (tmp_path / place / file_of((0, 2)) for place in ("alone", "beside"))
    assert len(read_share(alone)) == 2
    assert alone.read_bytes() == beside.read_bytes()


def test_answers_that_are_not_kept_are_left_out_and_no_error(
    toy_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Generated(index=1, tokens=(), finished=False, refused="too rude")
    engine = Engine(toy_target, _0=say(0, "cut", finished=False), _1=refused)
    shares = opened(toy_target, engine, InTurn(), tmp_path)
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
    lock = InTurn()
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


def twice(path: Path) -> None:
    first = path.read_bytes().splitlines()[0]
    path.write_bytes(first + b"\n" + path.read_bytes())


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another(key: str, value: Any) -> Callable[[Path], None]:
    """Write rows with another value, as a run would have; what is compared is more than bytes."""

    def change(path: Path) -> None:
        rows = [json.loads(line) | {key: value} for line in path.read_text().splitlines()]
        path.write_bytes(share_text(rows))

    return change


def edit(path: Path) -> None:
    begin = '"assistant", "content": "'
    path.write_text(path.read_text().replace(begin, f"{begin}never ", 1))


def token(path: Path) -> None:
    path.write_text(re.sub(r'("input_ids": \[)\d+', r"\g<1>3", path.read_text(), count=1))


@pytest.mark.parametrize(
    "damage",
    [
        twice,  # a row would be trained on twice
        pipe,  # which would be waited for
        edit,  # an answer
        token,  # which is trained on
        lambda path: path.write_bytes(path.read_bytes().splitlines(keepends=True)[1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_bytes(b"[1]\n"),
        another("id", "7"),
        another("id", [1]),
        another("messages", None),
        another("messages", ["say"]),
        another("messages", [{"role": "user", "content": "another one"}]),
        another("sampling", {}),
    ],
)
def test_a_file_that_is_not_what_this_run_would_write_is_written_again(
    toy_target: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = tmp_path / file_of((0, 2))
    left = temporary(path)
    left.touch()  # by a process that was killed
    wrote = []
    for calls in (1, 0, 1):
        engine = Engine(toy_target)
        shares = opened(toy_target, engine, InTurn(), tmp_path)
        shares.ask((0, 2))
        assert shares.wait(20)
        shares.close(20)
        assert len(engine.calls) == calls
        wrote.append(path.read_bytes())
        if not calls:
            damage(path)
    assert wrote[0] == wrote[2]
    assert not left.exists()


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
        (tmp_path / file_of((0, 1))).write_bytes(share_text([row]))
        shares = Shares(run, TOKENIZER, engine, InTurn(), [task], tmp_path)
        shares.ask((0, 1))
        assert shares.wait(20)
        assert len(engine.calls) == calls
        shares.close(20)
