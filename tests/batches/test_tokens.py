"""Micro-batches of so many tokens: ranks have as many each, and every sample comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

import pytest
import torch

from specforge_core.batches.loader import Share, Source, StoredSource
from specforge_core.batches.turns import evenly, windows
from specforge_core.errors import DataError

from .sources import Echo, Stored, batches, online, stored


class Counted(Stored):
    """A reader that knows its samples' lengths without reading them, as the core's does."""

    def num_tokens(self, index: int) -> int:
        return index + 1


def counted(share: Share, count: int = 7) -> StoredSource:
    return StoredSource(Counted(count), share)


def lengths(count: int, seed: int) -> list[int]:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (100 * 20**drawn).long().tolist()  # 100 to 2,000, most of them short


def supervised(tokens: int, place: int) -> int:
    return tokens * (50 + place % 31) // 100  # about half to four fifths


def anchors(tokens: int, place: int) -> int:
    return min(512, supervised(tokens, place))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rows", [None, supervised, anchors], ids=["tokens", "rows", "anchors"])
def test_ranks_have_as_much_to_do_as_each_other_within_5_percent(
    ranks: int, rows: Callable[[int, int], int] | None
) -> None:
    sizes, tokens = lengths(3000, ranks), 8192
    found = []
    for rank in range(ranks):
        share = Share(rank, ranks, 0, tokens=tokens)
        look = lambda place: (place // 3000, sizes[place % 3000])  # noqa: E731
        work = None if rows is None else lambda place: rows(sizes[place % 3000], place)
        groups = windows(share, 0, 1, look, lambda: 3000, work=work)
        found.append([turns for turns, _ in islice(groups, 60)])
    places: list[int] = []
    for step, shares in enumerate(zip(*found, strict=True)):
        (reached,) = {turns[-1].reached for turns in shares}
        taken = [[turn.place for turn in turns if turn.counts] for turns in shares]
        places += [place for mine in taken for place in mine]
        assert sorted(places) == list(range(reached or 0))
        if (reached or 0) % 3000:  # the last one of an epoch has what is left
            sums = [sum(sizes[place % 3000] for place in mine) for mine in taken]
            assert max(sums) < 1.05 * sum(sums) / ranks, step
            assert ranks * tokens - 2000 < sum(sums) <= ranks * tokens
            if rows is not None:
                made = [sum(rows(sizes[at % 3000], at) for at in mine) for mine in taken]
                assert max(made) < 1.05 * sum(made) / ranks, step


@pytest.mark.parametrize("position", [0, 400])
def test_windows_end_with_the_same_step_on_all_ranks(position: int) -> None:
    sizes = lengths(900, 1)
    look = lambda place: (place // 900, sizes[place % 900])  # noqa: E731
    ends, counts = [], []
    for rank in range(2):
        groups = windows(Share(rank, 2, 0, tokens=4096), position, 8, look, lambda: 900)
        some = list(islice(groups, 40))
        ends.append([turns[-1].reached for turns, _ in some])
        counts += [len(turns) for turns, _ in some]
    assert ends[0] == ends[1]
    assert min(counts) < 8 < max(counts)  # so a rank's own samples do not end one


@pytest.mark.parametrize(("sizes", "ranks"), [([], 2), ([5], 2), ([3, 3, 2, 2, 2], 2)])
def test_samples_are_dealt_out_evenly(sizes: list[int], ranks: int) -> None:
    taken = evenly([(size,) for size in sizes], ranks)
    assert sorted(at for mine in taken for at in mine) == list(range(len(sizes)))
    sums = [sum(sizes[at] for at in mine) for mine in taken]
    if len(sizes) > 2:  # which the largest first alone does not find
        assert sums == [6, 6]


def test_of_many_samples_hardly_any_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange looks at all pairs of places, so the first deal of many must do."""
    monkeypatch.setattr("specforge_core.batches.turns.NEAR", float("inf"))  # none at all
    sizes = lengths(2000, 0)
    costs = [(size, size * (5 + place % 91) // 100) for place, size in enumerate(sizes)]
    taken = evenly(costs, 8)
    for part in zip(*costs, strict=True):
        sums = [sum(part[at] for at in mine) for mine in taken]
        assert max(sums) < 1.01 * sum(sums) / 8


# (ranks, tokens of a micro-batch, micro-batches), one after the other
PLANS = (
    [(1, 14, 3), (2, 8, 4), (3, 7, 5), (1, 11, 9)],
    [(3, 9, 4), (1, 12, 4), (2, 7, 6)],
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [counted, online], ids=["offline", "online"])
@pytest.mark.parametrize("count", [7, 11])
def test_every_sample_comes_once_an_epoch_however_many_ranks_there_are(
    plan: Sequence[tuple[int, int, int]], make: Callable[..., Source], count: int
) -> None:
    position, found = 0, []
    for ranks, tokens, steps in plan:
        reached = set()
        for rank in range(ranks):
            share = Share(rank, ranks, 3, tokens=tokens)
            micros = list(islice(batches(make(share, count=count), share, position), steps))
            found += [index for micro in micros for index in micro.indices]
            reached.add(micros[-1].position)
        (position,) = reached
    assert position == len(found)
    epochs, rest = divmod(len(found), count)
    counts = Counter(found)
    assert epochs >= 2
    assert {counts[i] for i in range(count)} <= {epochs, epochs + 1}
    assert sum(counts[i] == epochs + 1 for i in range(count)) == rest


@pytest.mark.parametrize("make", [counted, online], ids=["offline", "online"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_stream_taken_up_again_is_cut_and_captured_as_it_was(
    make: Callable[..., Source], ranks: int
) -> None:
    for rank in range(ranks):
        share = Share(rank, ranks, 3, tokens=9)
        engines = Echo(), Echo()
        options = [{"engine": engine} if make is online else {} for engine in engines]
        whole = list(islice(batches(make(share, **options[0]), share), 30))
        for done in (1, 4, 6):
            position = whole[done - 1].position
            again = islice(batches(make(share, **options[1]), share, position), 12 - done)
            for one, other in zip(whole[done:12], again, strict=True):
                assert (one.position, one.num_tokens) == (other.position, other.num_tokens)
                assert one.indices == other.indices
        # what is captured together is what had been, also of windows made ahead
        assert all(asked in engines[0].asked for asked in engines[1].asked)


@pytest.mark.parametrize("make", [counted, online], ids=["offline", "online"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_never_has_a_sample_of_its_own_keeps_step(
    make: Callable[..., Source], ranks: int
) -> None:
    steps = []
    for rank in range(ranks):
        share = Share(rank, ranks, 0, tokens=9)
        steps.append(list(islice(batches(make(share, count=1), share), 5)))
    for epoch, micros in enumerate(zip(*steps, strict=True), 1):
        assert {micro.position for micro in micros} == {epoch}
        assert sum(micro.num_samples for micro in micros) == 1
        assert all(micro.batch["input_ids"].numel() for micro in micros)


@pytest.mark.parametrize("make", [counted, online], ids=["offline", "online"])
def test_the_last_step_ends_with_what_is_trained_on(make: Callable[..., Source]) -> None:
    found = []
    for rank in range(2):
        share = Share(rank, 2, 3, tokens=9)
        micros = list(islice(batches(make(share), share, end=10), 12))
        assert micros[-1].position == 10
        assert micros[-1].num_samples == 0
        found += [index for micro in micros for index in micro.indices]
    assert len(found) == 10
    assert set(found) == set(range(7))


def test_a_reader_that_tells_no_lengths_is_refused() -> None:
    share = Share(0, 1, 3, tokens=9)
    with pytest.raises(DataError, match=r"Try: train\.batch_size"):
        next(iter(stored(share).samples(0)))
