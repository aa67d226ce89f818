"""Tokens of large data: made by several processes, kept on disk, and the same in every way."""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specforge_core.config import DataConfig
from specforge_core.data import prompts, tokencache, workers
from specforge_core.data.files import open_source
from specforge_core.data.prompts import PromptSet
from specforge_core.errors import DataError
from specforge_core.testing.forked import SERVER, begin, python
from specforge_core.testing.toy import toy_tokenizer, write_conversations

from .prompted import load_prompts

TOKENIZER = toy_tokenizer()
VOCAB = len(TOKENIZER)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SMALL", 0)
    monkeypatch.setattr(workers, "FIRST", 5)
    monkeypatch.setattr(workers, "CHUNK", 7)


def load(path: Path, tokenizer: Any = TOKENIZER, **options: Any) -> PromptSet:
    options = {"cache": path.parent / "cache", "workers": 0, **options}
    data = DataConfig(train=(str(path),), **options)
    return load_prompts(data, tokenizer, VOCAB, lambda source, _: open_source(source))


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").iterdir() if path.is_dir()]


def same(one: PromptSet, other: PromptSet) -> bool:
    pairs = zip(one, other, strict=True)
    return one.told == other.told and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_mask, b.loss_mask)
        for a, b in pairs
    )


def write(folder: Path, count: int = 60) -> Path:
    """Write conversations, a bad line at every tenth place."""
    path = write_conversations(folder / "d.jsonl", count, turns=2)
    lines = path.read_text().splitlines()
    lines[::10] = ["{"] * len(lines[::10])
    path.write_text("\n".join(lines))
    return path


def test_tokens_on_disk_are_those_in_memory_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    options: dict[str, Any] = {"on_error": "skip", "max_length": 60}
    plain = load(path, cache=None, **options)
    assert plain.told.conversations == 54
    assert plain.told.cut > 0
    assert same(load(path, **options), plain)
    monkeypatch.setattr(prompts, "make_rows", None)  # nothing is made any more
    again = load(path, **options)
    assert same(again, plain)
    assert torch.equal(again.token_counts(VOCAB), plain.token_counts(VOCAB))
    assert again.num_supervised == plain.num_supervised == int(plain.token_counts(VOCAB).sum())
    said = "data.train: 36 rows skipped (30 without an answer in data.max_length, 6 not JSON)"
    assert capsys.readouterr().err.count(said) == 3
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert same(load(copy, **options), plain)


def test_what_changes_the_tokens_is_made_anew(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 8)
    other = toy_tokenizer()
    other.chat_template = f"- {other.chat_template}"
    changes: list[dict[str, Any]] = [
        {},
        {"max_length": 50},
        {"limit": 3},
        {"too_long": "skip"},
        {"chat_template_kwargs": {"x": 1}},
        {"ignore_fields": ("x",)},
        {"tokenizer": other},
    ]
    for count, change in enumerate(changes, 1):
        load(path, **change)
        assert len(entries(tmp_path)) == count
        load(path, **change)
        assert len(entries(tmp_path)) == count
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[0])
    assert len(load(path)) == 9


@pytest.mark.parametrize("name", ["input_ids", "loss_mask", "offsets", "told.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_tokens_are_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 8)
    plain = load(path)
    expected = [prompt.input_ids.tolist() for prompt in plain]
    (entry,) = entries(tmp_path)
    content = (entry / name).read_bytes()
    if damage == "gone":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(content[:-3] + (b"xyz" if damage == "changed" else b""))
    assert [prompt.input_ids.tolist() for prompt in load(path)] == expected
    assert (entry / name).read_bytes() == content


def test_a_failed_reading_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError, match="is not a line of JSON"):
        load(path)
    assert entries(tmp_path) == []


def test_where_nothing_can_be_written_tokens_are_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 8)
    (tmp_path / "file").write_text("")
    assert same(load(path, cache=tmp_path / "file/cache"), load(path, cache=None))
    assert f"tokens are not kept in data.cache ({tmp_path}/file" in capsys.readouterr().err


def test_what_nobody_uses_is_removed(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 8)
    load(path)
    (old,) = entries(tmp_path)
    os.utime(old, (0, 0))
    load(path, max_length=50)
    assert old not in entries(tmp_path)
    (young,) = entries(tmp_path)
    then = time.time() - 1000
    os.utime(young, (then, then))
    load(path, max_length=50)
    assert young.stat().st_mtime > then + 1


RANK = """
import sys
from pathlib import Path
from specforge_core.data import prompts, tokencache
from tests.data import test_tokencache as here
prompts.SMALL = 0
make = prompts.make_rows
def told(*arguments):
    print("made", flush=True)
    return make(*arguments)
prompts.make_rows = told
print(len(here.load(Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_ranks_make_tokens_once(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "d.jsonl", 2000, turns=3)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [python(script, str(path), env=environment) for _ in range(3)]
    said = sorted(rank.communicate()[0] for rank in ranks)
    assert said == ["2000\n", "2000\n", "made\n2000\n"]


@pytest.mark.parametrize("count", [3, 5, 6, 12, 60])
def test_processes_make_the_same_rows_in_the_same_order(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, count)
    plain = load(path, cache=None, on_error="skip")
    assert same(load(path, cache=None, on_error="skip", workers=2), plain)


def work(pipe: Connection) -> None:
    workers.work(os.dup(pipe.fileno()))


def fork(command: list[str], pass_fds: list[int], **_: Any) -> Any:
    """Return a worker's process: a fork of a server that has imported what it needs."""
    pipe = Connection(os.dup(pass_fds[0]))
    begin()
    process: Any = SERVER.Process(target=work, args=(pipe,))
    process.start()
    pipe.close()
    return SimpleNamespace(
        kill=process.kill,
        terminate=process.terminate,
        wait=process.join,
        poll=lambda: process.exitcode,
    )


@pytest.mark.slow
def test_processes_that_start_python_make_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = slowly(monkeypatch)
    taken: list[object] = []
    take = workers.Worker.take

    def taking(self: workers.Worker) -> Any:
        taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(workers.Worker, "take", taking)
    path = write(tmp_path)
    plain = load(path, cache=None, on_error="skip")
    assert same(load(path, cache=None, on_error="skip", workers=2), plain)
    assert taken
    assert all(taken)
    assert len(begun) == 2


def slowly(monkeypatch: pytest.MonkeyPatch) -> list[workers.Worker]:
    """Let a run wait for its processes; return them."""
    found: list[workers.Worker] = []
    begin = workers.Worker.__init__

    def init(self: workers.Worker, make: Any) -> None:
        begin(self, make)
        found.append(self)
        assert self._pipe.poll(60)

    monkeypatch.setattr(workers.Worker, "__init__", init)
    return found


def test_errors_and_limits_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", fork)
    begun = slowly(monkeypatch)
    path = write_conversations(tmp_path / "d.jsonl", 60)
    lines = path.read_text().splitlines()
    lines[40] = json.dumps({"messages": [{"role": "assistant", "content": "first"}]})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"d\.jsonl:41: the conversation answers nothing"):
        load(path, workers=2)
    assert len(load(path, workers=2, limit=40)) == 40
    assert len(load(path, workers=2, on_error="skip")) == 59
    assert all(worker._process.poll() is not None for worker in begun)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_process_that_dies_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(workers.subprocess, "Popen", fork)
    begun = slowly(monkeypatch)
    give = workers.Worker.give

    def killing(self: workers.Worker, chunk: Any) -> bool:
        if when == "before":
            self._process.kill()
            self._process.wait()
        given = give(self, chunk)
        self._process.kill()
        return given

    monkeypatch.setattr(workers.Worker, "give", killing)
    path = write(tmp_path)
    plain = load(path, cache=None, on_error="skip")
    assert same(load(path, cache=None, on_error="skip", workers=2), plain)
    assert len(begun) == 2


def test_the_folder_of_tokens_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig().cache == tmp_path / ".cache/specforge/tokens"
    assert DataConfig(cache=None).cache is None
    assert tokencache.KEPT_SECONDS > 7 * 24 * 3600
