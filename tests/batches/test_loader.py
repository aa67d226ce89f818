from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import pytest
import torch

from specforge_core.batches.collate import pad
from specforge_core.batches.loader import (
    Batches,
    Closed,
    Micro,
    OnlineSource,
    Placed,
    Share,
    Source,
    StoredSource,
)
from specforge_core.data.order import epoch_order
from specforge_core.errors import DataError, PluginError
from specforge_core.types import (
    CaptureSpec,
    Collate,
    Field,
    Prompt,
    Sample,
    TargetCapture,
    Transform,
)

from ..captured import bare_strategy

CPU = torch.device("cpu")
STRATEGY = bare_strategy()
SPEC = CaptureSpec(layers=(), fields={"input_ids": Field(shape=(None,), dtype="int64")})


class Stored:
    """A reader of samples of ragged length; sample i holds i + 1 times the value i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.count
        return {"input_ids": torch.full((index + 1,), index)}


class Growing(Stored):
    """One more sample at every look, until there are `final`."""

    def __init__(self, final: int) -> None:
        super().__init__(0)
        self.final = final

    def refresh(self) -> bool:
        self.count = min(self.count + 1, self.final)
        return self.count == self.final


def keep(sample: Sample, generator: torch.Generator) -> Sample:
    return sample


def stored(share: Share, count: int = 7) -> StoredSource:
    return StoredSource(Stored(count), share)


PAD: Collate = partial(pad, ragged={"input_ids"})


def batches(
    source: Source,
    share: Share,
    position: int = 0,
    size: int = 2,
    transform: Transform = keep,
    collate: Collate = PAD,
    end: int | None = None,
) -> Iterator[Micro]:
    return Batches(
        strategy=STRATEGY,
        spec=SPEC,
        transform=transform,
        collate=collate,
        share=share,
        batch_size=size,
        device=CPU,
        end=end,
    ).micro_batches(source, position)


ALONE = Share(0, 1, 3)


def values(micro: Micro) -> list[int]:
    return [int(row[0]) for row in micro.batch["input_ids"]]


def seen(micros: Iterator[Micro], count: int) -> list[int]:
    return [value for m in islice(micros, count) for value in values(m)]


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


# ---- a run goes on under any number of ranks ----------------------------------


class Echo:
    """An engine that remembers which prompts it was asked for together."""

    info = None

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.busy = False

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        assert not self.busy
        self.busy = True
        self.asked.append([p.index for p in prompts])
        for p in reversed(prompts):
            yield TargetCapture(
                index=p.index, input_ids=p.input_ids, loss_mask=p.loss_mask, hidden_states={}
            )
        self.busy = False

    def close(self) -> None: ...


class Ids:
    """Keeps a prompt's tokens, unless its index is to be skipped."""

    spec = SPEC

    def __init__(self, skip: Sequence[int] = ()) -> None:
        self.skip = skip

    def __call__(self, capture: TargetCapture) -> Sample | None:
        return None if capture.index in self.skip else {"input_ids": capture.input_ids}


def online(
    share: Share, engine: Echo | None = None, count: int = 7, skip: Sequence[int] = ()
) -> OnlineSource:
    prompts = [
        Prompt(index=i, input_ids=torch.full((i + 1,), i), loss_mask=torch.ones(i + 1))
        for i in range(count)
    ]
    return OnlineSource(STRATEGY, engine or Echo(), Ids(skip), prompts, share, window=4)  # type: ignore[arg-type]


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


# ---- samples that are dropped --------------------------------------------------


def odd(sample: Sample, generator: torch.Generator) -> Sample | None:
    return sample if int(sample["input_ids"][0]) % 2 else None


def test_batches_are_padded_and_their_tokens_counted() -> None:
    micro = next(batches(stored(ALONE), ALONE, size=3))
    assert micro.batch["input_ids"].tolist() == [[0, 0, 0], [1, 1, 0], [2, 2, 2]]
    assert (micro.num_samples, micro.num_tokens, micro.position) == (3, 6, 3)


def test_a_dropped_sample_leaves_its_micro_batch_smaller() -> None:
    found = list(islice(batches(stored(ALONE), ALONE, size=3, transform=odd), 2))
    assert [values(micro) for micro in found] == [[1], [3, 5]]
    assert [(m.num_samples, m.num_tokens, m.position) for m in found] == [(1, 2, 3), (2, 10, 6)]


def test_what_the_adapter_skips_online_leaves_the_micro_batch_smaller_too() -> None:
    order = epoch_order(7, 3, 0)
    micros = batches(online(ALONE, skip=order[1:2]), ALONE, size=3)
    assert [values(micro) for micro in islice(micros, 2)] == [[order[0], order[2]], order[3:6]]


def test_where_all_samples_are_dropped_another_stands_in_and_counts_nothing() -> None:
    found = list(islice(batches(stored(ALONE), ALONE, size=1, transform=odd), 7))
    # the first one has none before it to stand in, so what comes next is looked at
    assert [values(micro) for micro in found] == [[1], [1], [1], [3], [3], [5], [5]]
    assert [micro.num_samples for micro in found] == [0, 1, 0, 1, 0, 1, 0]
    assert [micro.num_tokens for micro in found] == [0, 2, 0, 4, 0, 6, 0]
    assert [micro.position for micro in found] == list(range(1, 8))


def test_ranks_keep_step_when_one_of_them_drops_all_it_has() -> None:
    def late(sample: Sample, generator: torch.Generator) -> Sample | None:
        return sample if int(sample["input_ids"][0]) == 5 else None  # of 8: on rank 1 of 2

    shares = [Share(rank, 2, 3) for rank in range(2)]
    found = [list(islice(batches(stored(s, 8), s, size=2, transform=late), 2)) for s in shares]
    assert [[m.position for m in rank] for rank in found] == [[4, 8], [4, 8]]
    assert [[m.num_samples for m in rank] for rank in found] == [[0, 0], [0, 1]]
    assert all(values(m) == [5] for rank in found for m in rank)


@pytest.mark.parametrize("growing", [False, True])
def test_an_epoch_without_a_sample_to_train_on_is_an_error(growing: bool) -> None:
    reader = Growing(7) if growing else Stored(7)
    source = StoredSource(reader, ALONE)
    micros = batches(source, ALONE, size=1, transform=lambda sample, generator: None)
    with pytest.raises(DataError, match="none of 7 samples can be trained on"):
        next(micros)


def test_what_a_plugin_raises_or_returns_names_the_hook() -> None:
    def broken(sample: Sample, generator: torch.Generator) -> Sample:
        raise KeyError("label")

    with pytest.raises(PluginError, match="specforge_transform: KeyError: 'label'"):
        next(batches(stored(ALONE), ALONE, transform=broken))
    with pytest.raises(PluginError, match="specforge_collate: returned list, expected Batch"):
        next(batches(stored(ALONE), ALONE, collate=list))  # type: ignore[arg-type]


# ---- captures that grow, and windows of prompts ---------------------------------


def test_a_growing_capture_is_waited_for_and_gives_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specforge_core.batches.loader.POLL_SECONDS", 0.0)
    grown = seen(batches(StoredSource(Growing(7), ALONE), ALONE), 7)
    assert grown == seen(batches(stored(ALONE), ALONE), 7)


def test_a_growing_capture_that_ends_empty_is_an_error() -> None:
    with pytest.raises(DataError, match="finished without a sample"):
        next(batches(StoredSource(Growing(0), ALONE), ALONE))


def test_nobody_waits_for_a_capture_after_its_source_is_closed() -> None:
    class Dead(Stored):
        def refresh(self) -> bool:
            return False

    source = StoredSource(Dead(0), ALONE)
    source.close()
    with pytest.raises(Closed):
        next(source.samples(0))


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
    assert resumed.asked == whole.asked[1:]
