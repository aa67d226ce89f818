"""Training that begins before the last row is tokenized, on the rows of one that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.batches.loader import OnlineSource, Placed, Prompts, Share
from specforge_core.config import DataConfig
from specforge_core.data import prompts, promptset
from specforge_core.data.files import FileRows, open_source
from specforge_core.data.order import Order, epoch_order
from specforge_core.data.prompts import Asked, open_prompts
from specforge_core.data.sources import Line
from specforge_core.data.stream import Closed, Stream
from specforge_core.errors import CheckpointError, DataError
from specforge_core.testing.runs import load, losses, write_run
from specforge_core.testing.toy import toy_tokenizer, write_conversations
from specforge_core.train.run import train

from ..batches.sources import STRATEGY, Echo, Ids

TOKENIZER = toy_tokenizer()
COUNT, GROUP = 50, 8


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SMALL", 0)
    monkeypatch.setattr(promptset, "SHOWN", 3)


@dataclass
class Gated:
    """Rows of a file, the later ones only when they are let through."""

    rows: FileRows
    open: int  # rows that are not held up
    gate: threading.Event = field(default_factory=threading.Event)
    num_bytes: int = 1

    def __iter__(self) -> Iterator[Line | DataError]:
        for number, row in enumerate(self.rows):
            assert number < self.open or self.gate.wait(60)
            yield row

    def fingerprint(self) -> str:
        return self.rows.fingerprint()


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[Gated]:
    found = open_source(str(write_conversations(tmp_path / "d.jsonl", COUNT, turns=2)))
    assert isinstance(found, FileRows)
    gated = Gated(found, 21)
    yield gated
    gated.gate.set()


def ask(folder: Path, rows: Gated, **options: Any) -> Asked:
    data = DataConfig(
        train=("d.jsonl",), cache=folder / "cache", workers=0, shuffle_window=GROUP, **options
    )
    return open_prompts(data, TOKENIZER, len(TOKENIZER), lambda *_: rows)  # type: ignore[arg-type,return-value]


@pytest.fixture
def stream(tmp_path: Path, gated: Gated) -> Iterator[Stream]:
    found = ask(tmp_path, gated).stream()
    assert isinstance(found, Stream)
    yield found
    gated.gate.set()
    found.close()


def samples(found: Prompts, share: Share, position: int = 0) -> Iterator[Placed]:
    return OnlineSource(STRATEGY, Echo(), Ids(), found, share, window=4).samples(position)  # type: ignore[arg-type]


def shown(placed: Placed) -> tuple[int, int, int, list[int]]:
    assert placed.sample is not None
    return placed.epoch, placed.number, placed.index, placed.sample["input_ids"].tolist()


def test_the_first_samples_come_before_the_last_row_is_read(stream: Stream, gated: Gated) -> None:
    share = Share(0, 1, 3, GROUP)
    source = samples(stream, share)
    first = [shown(placed) for placed in islice(source, 2 * GROUP)]
    assert not gated.gate.is_set()
    assert sorted(index for _, _, index, _ in first) == list(range(2 * GROUP))
    gated.gate.set()
    found = first + [shown(placed) for placed in islice(source, 2 * COUNT)]
    plain = samples(prompts.in_memory(stream._fill), share)
    assert found == [shown(placed) for placed in islice(plain, 2 * GROUP + 2 * COUNT)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_epoch_has_every_sample_once_wherever_a_run_goes_on(
    stream: Stream, gated: Gated, ranks: int
) -> None:
    gated.gate.set()
    whole = [shown(p) for p in islice(samples(stream, Share(0, 1, 3, GROUP)), 2 * COUNT)]
    for epoch in (0, 1):
        numbers = [n for _, n, _, _ in whole[epoch * COUNT : (epoch + 1) * COUNT]]
        assert sorted(numbers) == list(range(COUNT))
    for position in (0, 12, COUNT - 2):
        shares = [samples(stream, Share(rank, ranks, 3, GROUP), position) for rank in range(ranks)]
        turns = [shown(next(shares[i % ranks])) for i in range(COUNT)]
        assert turns == whole[position : position + COUNT]


def test_another_process_reads_what_the_first_has_written(
    stream: Stream, gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.wait(GROUP)
    monkeypatch.setattr(prompts, "make_rows", None)  # it makes none itself
    other = ask(tmp_path, gated).stream()
    assert isinstance(other, Stream)
    try:
        assert GROUP <= other.wait(GROUP) < COUNT
        assert other[3].input_ids.tolist() == stream[3].input_ids.tolist()
        assert other[3].loss_mask.tolist() == stream[3].loss_mask.tolist()
        gated.gate.set()
        assert other.wait() == stream.wait() == COUNT
        assert torch.equal(other[COUNT - 1].input_ids, stream[COUNT - 1].input_ids)
    finally:
        other.close()
    assert not isinstance(ask(tmp_path, gated).stream(), Stream)  # all of them are kept


def test_another_process_goes_on_where_the_first_one_ends(
    stream: Stream, gated: Gated, tmp_path: Path
) -> None:
    stream.wait(GROUP)
    other = ask(tmp_path, gated).stream()
    assert isinstance(other, Stream)
    try:
        before = [other[i].input_ids.tolist() for i in range(GROUP) if other.wait(GROUP)]
        stream.stop()
        gated.gate.set()
        assert other.wait() == COUNT
        assert [other[i].input_ids.tolist() for i in range(GROUP)] == before
    finally:
        other.close()
    with pytest.raises(Closed):
        stream.wait()


def test_what_is_wrong_with_a_later_row_is_raised(tmp_path: Path, gated: Gated) -> None:
    with gated.rows.files[0].open("a") as file:
        file.write("{\n")
    stream = ask(tmp_path, gated).stream()
    assert stream.wait(GROUP) >= GROUP
    gated.gate.set()
    with pytest.raises(DataError, match=r"d\.jsonl:51 is not a line of JSON"):
        stream.wait()
    stream.close()


@pytest.mark.parametrize(("count", "window"), [(50, 8), (48, 8), (5, 8), (50, None), (50, 50)])
def test_the_order_is_known_from_the_samples_so_far(count: int, window: int | None) -> None:
    """It is the same whether all are known or only those of the groups so far."""
    here: Callable[[int | None], int] = lambda n: count if n is None else min(n, count)  # noqa: E731
    early, late = Order(3, window, here), Order(3, window, lambda _: count)
    found = [early.at(place) for place in range(3 * count)]
    assert found == [late.at(place) for place in range(3 * count)]
    for epoch in range(3):
        part = found[epoch * count : (epoch + 1) * count]
        assert part == [(epoch, index) for index in epoch_order(count, 3, epoch, window)]
        assert sorted(index for _, index in part) == list(range(count))
    if window is None or window >= count:
        assert epoch_order(count, 3, 1, window) == epoch_order(count, 3, 1)
    else:
        assert set(epoch_order(count, 3, 0, window)[:window]) == set(range(window))


@pytest.mark.parametrize("window", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_a_run_trains_the_same_whether_its_tokens_are_kept(
    tmp_path: Path, toy_target: Path, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "GROUP", 8)
    config = write_run(
        tmp_path,
        toy_target,
        conversations=20,
        strategy={"name": "linear"},
        data={"cache": str(tmp_path / "cache"), "shuffle_window": window, "workers": 0},
        train={"batch_size": 2, "schedule": "constant", "warmup_ratio": 0.0},
    )
    streams: list[Asked] = []
    stream = Asked.stream

    def streaming(self: Asked) -> Any:
        found = stream(self)
        if isinstance(found, Stream):
            streams.append(self)
        return found

    monkeypatch.setattr(Asked, "stream", streaming)
    for name, stops in (("streamed", (4, 12)), ("kept", (12,))):
        for steps in stops:
            place = f"output_dir={tmp_path / name}"
            train(*load(config, place, f"train.max_steps={steps}"))
        assert len(streams) == 1
    assert losses(tmp_path / "streamed") == losses(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"data\.shuffle_window=.*: the order"):
        train(*load(config, place, "train.max_steps=14", "data.shuffle_window=9"))
