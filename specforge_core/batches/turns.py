"""Which samples of the endless sequence a rank takes.

A micro-batch of all ranks is `world_size * batch` places that follow each other.  Which rank takes
which of them changes no sum over ranks, only how long they wait for the one with most to do: so
they are dealt out by their tokens, and by the rows that the objective makes of them.  With
`train.batch_tokens` it is as many places as have so many tokens together, cut anew in each epoch,
and ranks may take unlike numbers of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple, TypeAlias

import numpy as np

from ..types import Sample

NEAR = 1.01  # of the mean: a rank that has no more than this is not worth another exchange
MANY = 4096  # samples, of which no exchange is looked for: it takes memory for all pairs of them


@dataclass(frozen=True, slots=True)
class Placed:
    """One sample of the endless sequence."""

    epoch: int
    number: int  # which sample of an epoch it is, the same in every epoch
    index: int  # what a user finds it by: its row in the data set, or in the capture
    sample: Sample | None  # None: the strategy's adapter turned it down
    reached: int | None = None  # as `Turn.reached`
    counts: bool = True  # as `Turn.counts`


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data one rank sees, and in which order."""

    rank: int
    world_size: int
    seed: int
    window: int | None = None  # samples that are shuffled together; None: all
    first: int | None = None  # the same in the first epoch, where it is another
    batch: int = 1  # samples of a micro-batch, among which ranks are balanced
    tokens: int | None = None  # of a micro-batch, instead of `batch` samples

    @property
    def block(self) -> int:
        """The samples of all ranks' micro-batches."""
        return self.world_size * self.batch


# what a step makes of a sample with so many tokens, so many of them supervised
Rows: TypeAlias = Callable[[int, int], int]


def supervised_rows(tokens: int, supervised: int) -> int:
    """Return what is trained of a sample, where a strategy does not say more."""
    return supervised


class Turn(NamedTuple):
    """A place that a rank takes."""

    place: int
    # in micro-batches of tokens, at the last of one: the samples that all ranks are done with then
    reached: int | None = None
    counts: bool = True  # not where there is none for this rank, and it only keeps step


class Cut(NamedTuple):
    """A rank's turns of one micro-batch of tokens."""

    turns: list[Turn]
    samples: int  # that all ranks take
    ends: bool  # an epoch, or what is trained on


def windows(
    share: Share,
    position: int,
    size: int,
    look: Callable[[int], tuple[int, int]],
    samples: Callable[[], int],
    *,
    end: int | None = None,
    work: Callable[[int], int] | None = None,
) -> Iterator[tuple[list[Turn], int]]:
    """Yield a rank's turns in groups of `size`, or about as many, and how many of each are done.

    Groups begin at fixed places, as far before `position` as need be, so that a resumed run has the
    same ones; and with one step on all ranks, which wait for them at once then, and not for one
    another in turn.  `look` gives the epoch and the tokens at a place, `samples` how many an epoch
    has, `work` the rows at a place, where those are known.
    """
    if share.tokens is None:
        ranks = share.world_size
        done = position // ranks % size if position % ranks == 0 else 0
        mine = places(share, position, lambda place: look(place)[1], work, end=end, back=done)
        while True:
            yield [Turn(place) for place in islice(mine, size)], done
            done = 0
    group: list[Turn] = []
    taken = 0
    for cut in _cuts(share, position, look, samples, end, work):
        group += cut.turns
        taken += cut.samples
        full = taken >= size * share.world_size or cut.ends
        reached = cut.turns[-1].reached or 0
        if full and reached > position:
            ended = [at for at, turn in enumerate(group) if turn.reached is not None]
            past = [at for at in ended if (group[at].reached or 0) <= position]
            yield group, past[-1] + 1 if past else 0
        if full:
            group, taken = [], 0


def places(
    share: Share,
    position: int,
    tokens: Callable[[int], int],
    work: Callable[[int], int] | None = None,
    *,
    end: int | None = None,
    back: int = 0,
) -> Iterator[int]:
    """Yield the places that a rank takes, from `back` of its own before `position` on.

    Blocks begin at multiples of their size.  Elsewhere (behind a resume under another number of
    ranks), in a block that the data ends in, and for batches of one sample ranks take turns.
    """
    ranks, block = share.world_size, share.block
    if share.batch == 1 or ranks == 1 or position % block:
        yield from count(position - back * ranks + share.rank, ranks)
    own = position // ranks - back
    blocks = count(own // share.batch * block, block)
    yield from islice(_of_blocks(blocks, share, tokens, work, end), own % share.batch, None)


def _of_blocks(
    blocks: Iterator[int],
    share: Share,
    tokens: Callable[[int], int],
    work: Callable[[int], int] | None,
    end: int | None,
) -> Iterator[int]:
    for first in blocks:
        if end is not None and first + share.block > end:
            yield from range(first + share.rank, first + share.block, share.world_size)
            continue
        sizes = [tokens(place) for place in range(first, first + share.block)]
        mine = evenly(_costs(first, sizes, work), share.world_size, share.batch)[share.rank]
        yield from (first + at for at in mine)


def _costs(
    first: int, sizes: Sequence[int], work: Callable[[int], int] | None
) -> list[tuple[int, ...]]:
    """Return the tokens and, where it is known, the work of places from `first` on."""
    if work is None:
        return [(size,) for size in sizes]
    return [(size, work(place)) for place, size in enumerate(sizes, first)]


def _cuts(
    share: Share,
    position: int,
    look: Callable[[int], tuple[int, int]],
    samples: Callable[[], int],
    end: int | None,
    work: Callable[[int], int] | None,
) -> Iterator[Cut]:
    """Yield a rank's part of each micro-batch, from the start of the epoch of `position` on.

    One ends before the sample with which all ranks would have too many tokens, but has one for
    each; with an epoch; at `end`; and at `position`, where ranks of another number began anew.
    """
    assert share.tokens is not None
    epoch = look(position)[0]
    place = epoch * samples() if epoch else 0
    while True:
        first, epoch = place, look(place)[0]
        bound = min((b for b in (position, end) if b is not None and b > place), default=None)
        sizes: list[int] = []
        total = 0
        ends = False
        while place != bound:
            at, size = look(place)
            if ends := at != epoch:
                break
            full = total + size > share.world_size * share.tokens
            if full and len(sizes) >= share.world_size:
                break
            sizes.append(size)
            total += size
            place += 1
        # one rank has it all: what is not needed is not read
        costs = _costs(first, sizes, work if share.world_size > 1 else None)
        mine = [Turn(first + at) for at in evenly(costs, share.world_size)[share.rank]]
        mine = mine or [Turn(first, counts=False)]
        mine[-1] = mine[-1]._replace(reached=place)
        yield Cut(mine, len(sizes), ends or place == end)


def evenly(
    costs: Sequence[tuple[int, ...]], ranks: int, batch: int | None = None
) -> list[list[int]]:
    """Return which of `costs` each rank takes, `batch` of them if that is given.

    A cost has several parts, such as tokens and rows; each counts as its share of that part's sum,
    and a rank's load is the largest of its parts.  The largest first, to whose load is least with
    it, which of many leaves hardly anything to do (an exchange looks at all pairs of places); then
    the rank with the largest load gives one to another, or swaps one with it, whichever leaves the
    larger of the two loads smallest, as long as that is less and no load is near the mean.  Each
    rank's are in ascending order.
    """
    if not costs:
        return [[] for _ in range(ranks)]
    whole = np.asarray(costs, dtype=np.float64)
    share = whole * (ranks / np.maximum(whole.sum(0), 1))  # a rank's mean is 1 in each part
    owner = np.zeros(len(costs), dtype=np.int64)
    load = np.zeros((ranks, share.shape[1]))
    count = np.zeros(ranks, dtype=np.int64)
    for at in np.argsort(-share.sum(1), kind="stable"):
        full = 0 if batch is None else np.where(count < batch, 0, np.inf)
        owner[at] = rank = int(((load + share[at]).max(1) + full).argmin())
        load[rank] += share[at]
        count[rank] += 1
    while (top := load.max()) > NEAR and len(costs) <= MANY:
        most = int(load.max(1).argmax())
        mine, others = (np.flatnonzero(found) for found in (owner == most, owner != most))
        nothing = np.zeros((ranks if batch is None else 0, share.shape[1]))
        back = np.concatenate([share[others], nothing])  # what may be given for one, or nothing
        to = np.concatenate([owner[others], np.arange(len(nothing))])
        moved = share[mine][:, None] - back
        left = np.maximum((load[most] - moved).max(2), (load[to] + moved).max(2))
        left[:, to == most] = np.inf
        if not left.size or left.min() >= top - 1e-9:
            break
        a, b = divmod(int(left.argmin()), len(to))
        load[most] -= moved[a, b]
        load[to[b]] += moved[a, b]
        owner[mine[a]] = to[b]
        if b < len(others):
            owner[others[b]] = most
    return [np.flatnonzero(owner == rank).tolist() for rank in range(ranks)]
