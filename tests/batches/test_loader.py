"""The order of samples, and that every one comes, whatever the ranks and after a resume."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch

from specforge_core.batches.loader import (
    Placed,
    Share,
    Source,
)
from specforge_core.data.order import epoch_order
from specforge_core.types import (
    Sample,
    Transform,
)

from .sources import ALONE, Echo, batches, online, seen, stored, values


def test_the_first_epoch_is_in_stored_order_and_the_next_one_shuffled() -> None:
    order = seen(batches(stored(ALONE), ALONE), 7)
    assert order == [*range(7), *epoch_order(7, 3, 1)]
    assert order[7:] != order[:7]


def test_the_ranks_together_see_what_one_process_does() -> None:
    alone = seen(batches(stored(ALONE), ALONE, size=3), 6)
    ranks = [Share(r, 3, 3) for r in range(3)]
    shares = [seen(batches(stored(share), share, size=1), 6) for share in ranks]
    assert [shares[i % 3][i // 3] for i in range(18)] == alone


def test_a_stream_taken_up_again_goes_on_where_it_was() -> None:
    first = list(islice(batches(stored(ALONE), ALONE), 9))
    again = list(islice(batches(stored(ALONE), ALONE, position=first[3].position), 5))
    assert all(
        torch.equal(a.batch["input_ids"], b.batch["input_ids"])
        for a, b in zip(first[4:], again, strict=True)
    )


# (ranks, samples of a micro-batch, micro-batches of a step, steps), one after the other
PLANS = (
    [(1, 2, 1, 3), (2, 1, 2, 3), (2, 1, 1, 4)],
    [(2, 3, 1, 2), (3, 1, 2, 3), (1, 4, 1, 4)],
    [(2, 2, 2, 1), (1, 3, 1, 5), (3, 2, 3, 2), (2, 5, 1, 2)],
    [(3, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1), (3, 4, 1, 3), (1, 1, 1, 20)],
)


def train(plan: Sequence[tuple[int, int, int, int]], make: Callable[[Share], Source]) -> list[int]:
    """Return the samples that all ranks trained on, through every change of their number."""
    position, found = 0, []
    for ranks, size, accumulate, steps in plan:
        reached = set()
        for rank in range(ranks):
            share = Share(rank, ranks, 3)
            micros = list(islice(batches(make(share), share, position, size), steps * accumulate))
            found += [value for micro in micros for value in values(micro)]
            reached.add(micros[-1].position)
        (position,) = reached  # all ranks agree how far they are
    assert position == len(found)
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [stored, online], ids=["offline", "online"])
@pytest.mark.parametrize("count", [7, 11])
def test_every_sample_comes_once_an_epoch_however_many_ranks_there_are(
    plan: Sequence[tuple[int, int, int, int]], make: Callable[..., Source], count: int
) -> None:
    found = train(plan, lambda share: make(share, count=count))
    epochs, rest = divmod(len(found), count)
    counts = Counter(found)
    assert epochs >= 1
    assert sum(counts.values()) == epochs * count + rest
    # not more than once in the epoch under way, so exactly once in each one before
    assert {counts[i] for i in range(count)} <= {epochs, epochs + 1}
    assert sum(counts[i] == epochs + 1 for i in range(count)) == rest


@pytest.mark.parametrize("make", [stored, online], ids=["offline", "online"])
@pytest.mark.parametrize(("ranks", "size", "begin"), [(1, 5, 0), (2, 3, 4), (3, 2, 13), (4, 1, 9)])
def test_the_last_step_has_the_samples_that_are_left(
    make: Callable[..., Source], ranks: int, size: int, begin: int
) -> None:
    found, named = [], []
    for rank in range(ranks):
        share = Share(rank, ranks, 3)
        micros = list(islice(batches(make(share), share, begin, size, end=14), 14))
        for micro in micros[: math.ceil((14 - begin) / (ranks * size))]:
            found += values(micro)[: micro.num_samples]
            named += micro.indices
        assert micros[-1].position == 14
        assert sum(micro.num_samples == 0 for micro in micros) >= 11
    second = epoch_order(7, 3, 1)
    first = list(range(7)) if make is stored else epoch_order(7, 3, 0)
    shuffled = second if make is stored else [first[number] for number in second]
    assert sorted(found) == sorted(named) == sorted([*first, *shuffled][begin:])


def drawing(draws: dict[int, list[float]]) -> Transform:
    """Return a transform that notes each of its draws by the sample's value."""

    def transform(sample: Sample, generator: torch.Generator) -> Sample:
        value = int(sample["input_ids"][0])
        mine = draws.setdefault(value, [])
        mine.append(float(torch.rand((), generator=generator)))
        return sample

    return transform


@pytest.mark.parametrize("make", [stored, online], ids=["offline", "online"])
def test_a_samples_draws_depend_on_the_seed_the_epoch_and_the_sample_alone(
    make: Callable[..., Source],
) -> None:
    def draws(ranks: int, size: int, seed: int = 3, begin: int = 0) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for rank in range(ranks):
            share = Share(rank, ranks, seed)
            micros = batches(make(share), share, begin, size, drawing(found))
            # two epochs in all
            list(islice(micros, (14 - begin) // (ranks * size)))
        return {value: sorted(mine) for value, mine in found.items()}

    alone = draws(1, 1)
    assert all(len(mine) == 2 for mine in alone.values())  # another draw in every epoch
    assert len({draw for mine in alone.values() for draw in mine}) == 14
    assert draws(1, 7) == draws(2, 1) == draws(7, 2) == alone
    # taken up again after the first epoch: the second epoch's draws, whatever came before
    second = draws(1, 1, begin=7)
    assert all(mine[0] in alone[value] for value, mine in second.items())
    assert draws(1, 1, seed=4) != alone


def numbers(found: Iterator[Placed], count: int) -> list[int]:
    return [int(p.sample["input_ids"][0]) for p in islice(found, count) if p.sample is not None]


def test_online_samples_come_in_the_order_a_capture_stores_them() -> None:
    first = epoch_order(7, 3, 0)
    second = [first[i] for i in epoch_order(7, 3, 1)]
    assert numbers(online(ALONE).samples(0), 14) == [*first, *second]


def test_a_resumed_online_run_asks_for_the_same_windows() -> None:
    whole, resumed = Echo(), Echo()
    share = Share(1, 2, 3)
    every = numbers(online(share, whole).samples(0), 11)
    # 6 places of each of 2 ranks are done
    assert numbers(online(share, resumed).samples(12), 5) == every[6:]
    assert resumed.asked[:2] == whole.asked[1:3]  # one more of each is on its way
