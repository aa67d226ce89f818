"""Large files are read in a mixed order, each row once, and training begins with a part of them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.batches.loader import OnlineSource, Share
from specforge_core.config import DataConfig
from specforge_core.data import prompts, promptset, scatter
from specforge_core.data.files import open_source
from specforge_core.data.order import epoch_order
from specforge_core.data.prompts import Asked, open_prompts
from specforge_core.data.sources import Conversation
from specforge_core.data.stream import Stream
from specforge_core.errors import DataError
from specforge_core.testing.toy import toy_tokenizer
from specforge_core.train.feed import Counted

from ..batches.sources import STRATEGY, Echo, Ids

TOKENIZER = toy_tokenizer()
RUN, GROUP = 3, 8


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SMALL", 0)
    monkeypatch.setattr(promptset, "SHOWN", 3)
    monkeypatch.setattr(scatter, "RUN", RUN)
    for module in (scatter, prompts):
        monkeypatch.setattr(module, "GROUP", GROUP)


def write(path: Path, count: int, *, start: str = "", blank: int = 0) -> Path:
    """Write rows that say which line they are of; every `blank`-th line is empty."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for number in range(1, count + 1):
        says = f"{path.parent.name}/{path.name}:{number}"
        chat = [{"role": "user", "content": says}, {"role": "assistant", "content": "yes"}]
        lines.append(" " if blank and number % blank == 0 else json.dumps({"messages": chat}))
    path.write_text(start + "\n".join(lines))
    return path


def read(data: DataConfig) -> list[Conversation | DataError]:
    opened = [(source, open_source(source)) for source in data.train]
    assert scatter.can_scatter(opened, data, 1)
    return list(scatter.scattered(opened, data))


def where(found: list[Conversation | DataError]) -> list[str]:
    assert all(isinstance(one, Conversation) for one in found)
    return [one.where for one in found if isinstance(one, Conversation)]


def test_each_row_comes_once_and_knows_its_place(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "d.jsonl", 20, start="\n\n", blank=4)
    folder = tmp_path / "two"
    write(folder / "a.jsonl", 7, start="\ufeff")
    write(folder / "b.jsonl", 1)
    data = DataConfig(train=(str(one), str(folder)))
    found = read(data)
    places = where(found)
    expected = [f"d.jsonl:{n + 2}" for n in range(1, 21) if n % 4]
    expected += [f"a.jsonl:{n}" for n in range(1, 8)] + ["b.jsonl:1"]
    assert Counter(places) == Counter(expected)
    for row in found:
        assert isinstance(row, Conversation)
        file, line = row.where.split(":")
        shift = 2 if file == "d.jsonl" else 0
        assert row.messages[0]["content"].endswith(f"/{file}:{int(line) - shift}")
        assert row.source == (str(one) if file == "d.jsonl" else str(folder))
    assert places == where(read(data))  # the same in every process and run
    assert {place.split(":")[0] for place in places[:12]} > {"d.jsonl", "a.jsonl"}
    assert places != expected


def test_the_first_rows_are_like_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that come one behind the other are all in every group."""
    monkeypatch.setattr(scatter, "RUN", 4)
    files = [write(tmp_path / f"{name}.jsonl", 400) for name in "abc"]
    places = where(read(DataConfig(train=tuple(map(str, files)))))
    for start in range(0, 1200, 300):
        counts = Counter(place[0] for place in places[start : start + 300])
        assert all(60 <= counts[name] <= 140 for name in "abc"), counts


def test_a_mix_keeps_its_proportion(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 40) for name in "ab"]
    places = where(read(DataConfig(train=tuple(map(str, files)), mix=(3, 1))))
    for end in range(4, 52, 4):
        assert Counter(place[0] for place in places[:end])["b"] == end // 4
    assert len(set(places)) == len(places) == 53
    assert [p for p in places if p[0] == "a"] != [f"a.jsonl:{n}" for n in range(1, 41)]


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", 30)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:12], "{", "[]", *lines[12:]]))
    errors = [
        str(one) for one in read(DataConfig(train=(str(file),))) if isinstance(one, DataError)
    ]
    assert any(error.startswith("d.jsonl:13 is not a line of JSON") for error in errors)
    assert any(error.startswith("d.jsonl:14: expected an object") for error in errors)
    assert len(errors) == 2


@pytest.mark.parametrize(
    "options", [{"limit": 5}, {"shuffle_window": 8}, {"small": 10**9}, {"name": "d.json"}]
)
def test_other_data_keeps_its_order(tmp_path: Path, options: dict[str, Any]) -> None:
    small, name = options.pop("small", 1), options.pop("name", "d.jsonl")
    file = write(tmp_path / name, 20)
    if name == "d.json":
        file.write_text(f"[{','.join(file.read_text().splitlines())}]")
    data = DataConfig(train=(str(file),), **options)
    assert not scatter.can_scatter([(str(file), open_source(str(file)))], data, small)


def ask(tmp_path: Path) -> Asked:
    file = write(tmp_path / "d.jsonl", 50)
    data = DataConfig(train=(str(file),), cache=tmp_path / "cache", workers=0)
    return open_prompts(data, TOKENIZER, len(TOKENIZER), lambda name, _: open_source(name))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Rows from the 21st on are tokenized when it is open."""
    gate, make_rows = threading.Event(), prompts.make_rows

    def held(*given: Any) -> Iterator[Any]:
        for number, made in enumerate(make_rows(*given)):
            assert number < 21 or gate.wait(60)
            yield made

    class Held:
        def __init__(self, *given: Any) -> None:
            self._found = held(*given)

        def __iter__(self) -> Iterator[Any]:
            return self._found

        def close(self) -> None:
            pass

    monkeypatch.setattr(prompts, "make_rows", Held)
    yield gate
    gate.set()


def test_training_begins_while_rows_are_tokenized(tmp_path: Path, gate: threading.Event) -> None:
    asked = ask(tmp_path)
    stream = asked.stream()
    assert isinstance(stream, Stream)
    assert asked.window == GROUP
    share = Share(0, 1, 3, None, asked.window)
    source = OnlineSource(STRATEGY, Echo(), Ids(), stream, share, window=4).samples(0)  # type: ignore[arg-type]
    first = [placed.index for placed in islice(source, 2 * GROUP)]
    assert not gate.is_set()
    assert sorted(first) == list(range(2 * GROUP))
    gate.set()
    found = first + [placed.index for placed in islice(source, 150 - 2 * GROUP)]
    # the first epoch in groups, as it is captured for offline training; the others over all rows
    assert found[:50] == epoch_order(50, 3, 0, GROUP)
    for epoch in (1, 2):
        order = found[epoch * 50 : (epoch + 1) * 50]
        assert [found[:50][place] for place in epoch_order(50, 3, epoch)] == order
        assert sorted(order) == list(range(50))
        assert set(order[:GROUP]) != set(range(GROUP))
    data = Counted(stream, len(TOKENIZER))
    counts = data.token_counts
    assert data.num_samples is None
    stream.close()
    kept = ask(tmp_path).stream()
    assert not isinstance(kept, Stream)
    data = Counted(kept, len(TOKENIZER))
    assert torch.equal(counts, data.token_counts)
    assert data.num_samples == 50
    assert int(counts.sum()) == kept.num_supervised > 0
