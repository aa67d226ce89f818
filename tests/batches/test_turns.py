"""Which rank takes which samples: each sample once, as many tokens to each rank."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice

import pytest

from specforge_core.batches.stored import StoredSource
from specforge_core.batches.turns import Share, evenly, places

from .sources import Stored


class Counted(Stored):
    """A reader that knows its samples' lengths without reading them; sample i has i + 1 tokens."""

    def num_tokens(self, index: int) -> int:
        return index + 1


def of_ranks(
    ranks: int, batch: int, steps: int, sizes: list[int], end: int | None = None, position: int = 0
) -> list[list[int]]:
    """Return the places that each rank takes in so many micro-batches."""
    shares = [Share(rank, ranks, 3, batch=batch) for rank in range(ranks)]
    found = (places(share, position, sizes.__getitem__, end=end) for share in shares)
    return [list(islice(mine, steps * batch)) for mine in found]


@pytest.mark.parametrize(
    ("ranks", "batch"), [(1, 4), (2, 1), (2, 2), (2, 4), (3, 5), (4, 4), (8, 8)]
)
def test_every_block_is_taken_whole_by_all_ranks_together(ranks: int, batch: int) -> None:
    draw = random.Random(ranks)
    sizes = [draw.randint(100, 2000) for _ in range(20 * ranks * batch)]
    taken = of_ranks(ranks, batch, 20, sizes)
    for step in range(20):
        block = [place for mine in taken for place in mine[step * batch : (step + 1) * batch]]
        assert sorted(block) == list(range(step * ranks * batch, (step + 1) * ranks * batch))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_as_many_tokens_within_five_percent(ranks: int) -> None:
    """On average over steps, of the rank with most; taking turns gives 16 to 38 % more."""
    draw, batch, steps = random.Random(0), 4, 500
    sizes = [draw.randint(100, 2000) for _ in range(steps * ranks * batch)]
    taken = of_ranks(ranks, batch, steps, sizes)
    over = []
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        sums = [sum(sizes[place] for place in mine[part]) for mine in taken]
        over.append(max(sums) / (sum(sums) / ranks))
    assert 1 <= sum(over) / steps < 1.05


def test_the_largest_goes_to_who_has_least() -> None:
    assert evenly([(5,), (1,), (4,), (2,)], 2, 2) == [[0, 1], [2, 3]]
    assert evenly([(3,), (3,), (3,), (3,)], 2, 2) == [[0, 2], [1, 3]]
    assert evenly([(7,)], 1, 1) == [[0]]


def test_tokens_alone_are_not_all_that_is_dealt_out() -> None:
    """Of four samples as long, those with many rows are not of one rank."""
    assert evenly([(9, 8), (9, 7), (9, 1), (9, 2)], 2, 2) == [[0, 2], [1, 3]]


def test_of_many_samples_no_pairs_are_looked_at() -> None:
    """One has more than half of all tokens, so that no exchange can help; pairs would take 2 GB."""
    tracemalloc.start()
    taken = evenly([(10**9,), *[(1,)] * 19_999], 2, 10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(mine) for mine in taken] == [10_000, 10_000]
    assert peak < 50e6


def test_a_block_that_the_data_ends_in_is_taken_in_turns() -> None:
    """So that of its samples before the end each rank has its count, which `Batches` knows."""
    sizes = [1, 1, 9, 9, 8, 7, 1, 1]
    assert of_ranks(2, 2, 2, sizes) == [[0, 2, 4, 7], [1, 3, 5, 6]]
    assert of_ranks(2, 2, 2, sizes, end=8) == [[0, 2, 4, 7], [1, 3, 5, 6]]
    assert of_ranks(2, 2, 2, sizes, end=6) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("back", range(7))
def test_a_run_goes_on_with_the_samples_it_would_have_taken(back: int) -> None:
    """From a micro-batch's beginning, also with some of those before it once more."""
    draw, ranks, batch = random.Random(1), 3, 4
    sizes = [draw.randint(1, 50) for _ in range(30 * ranks * batch)]
    whole = of_ranks(ranks, batch, 10, sizes)
    for rank in range(ranks):
        share = Share(rank, ranks, 3, batch=batch)
        again = places(share, 5 * ranks * batch, sizes.__getitem__, back=back)
        assert list(islice(again, back + 5 * batch)) == whole[rank][5 * batch - back :]


def test_between_two_blocks_ranks_take_turns() -> None:
    assert of_ranks(2, 2, 2, [1] * 9, position=3) == [[3, 5, 7, 9], [4, 6, 8, 10]]


def test_a_captures_samples_are_dealt_by_their_lengths() -> None:
    """A reader that does not know them without reading has its samples taken in turns."""
    for reader, want in ((Counted(8), [[0, 3], [1, 2]]), (Stored(8), [[0, 2], [1, 3]])):
        shares = [Share(rank, 2, 3, batch=2) for rank in range(2)]
        found = [islice(StoredSource(reader, share).samples(0), 2) for share in shares]
        assert [[placed.index for placed in mine] for mine in found] == want


def test_a_captures_samples_are_dealt_by_what_a_step_makes_of_them() -> None:
    """As many rows as a reader says are supervised, or as the transform says of these."""

    class Masked(Counted):
        def num_tokens(self, index: int) -> int:
            return 10

        def num_supervised(self, index: int) -> int:
            return (9, 8, 2, 1)[index]

    def dealt(*rows: Callable[[int, int], int]) -> list[list[int]]:
        shares = [Share(rank, 2, 3, batch=2) for rank in range(2)]
        sources = [StoredSource(Masked(4), share) for share in shares]
        found = [islice(source.samples(0, None, *rows), 2) for source in sources]
        return [[placed.index for placed in mine] for mine in found]

    assert dealt() == [[0, 3], [1, 2]]
    assert dealt(lambda tokens, supervised: tokens // supervised) == [[1, 3], [0, 2]]


def test_no_sample_counts_for_more_tokens_than_are_trained_on() -> None:
    """With all of them cut alike, ranks take turns as if the lengths were unknown."""
    shares = [Share(rank, 2, 3, batch=2) for rank in range(2)]
    cut = [StoredSource(Counted(8), share, longest=1) for share in shares]
    found = [[placed.index for placed in islice(source.samples(0), 2)] for source in cut]
    assert found == [[0, 2], [1, 3]]


def test_later_epochs_are_read_ahead_too() -> None:
    asked: list[int] = []

    class Told(Counted):
        def __getitem__(self, index: int) -> dict[str, object]:  # type: ignore[override]
            asked.append(index)
            return super().__getitem__(index)

        def refresh(self) -> bool:
            return True

    source = StoredSource(Told(4), Share(0, 1, 3)).samples(0)
    for _ in range(5):
        next(source)
    until = time.monotonic() + 10
    while len(asked) <= 8 and time.monotonic() < until:  # threads read them
        time.sleep(0.01)
    assert len(asked) > 8


@pytest.mark.parametrize("seed", range(5))
def test_however_often_ranks_and_batches_change_each_place_is_taken_once(seed: int) -> None:
    """Resumes in the middle of blocks and of epochs, up to the last sample."""
    draw = random.Random(seed)
    for _ in range(12):
        end = draw.randint(5, 120)
        sizes = [draw.randint(1, 99) for _ in range(end + 400)]
        position, taken = 0, list[int]()
        while position < end:
            ranks, batch = draw.choice((1, 2, 3, 4)), draw.choice((1, 2, 3, 4, 8))
            shares = [Share(rank, ranks, 3, batch=batch) for rank in range(ranks)]
            found = [places(share, position, sizes.__getitem__, end=end) for share in shares]
            for _ in range(draw.randint(1, 6)):  # micro-batches until the next change
                for rank, mine in enumerate(found):
                    left = -(-(end - position - rank) // ranks)
                    taken += islice(mine, max(0, min(batch, left)))
                position = min(end, position + ranks * batch)
        assert sorted(taken) == list(range(end))
