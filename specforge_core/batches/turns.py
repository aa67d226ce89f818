"""Which samples of the endless sequence a rank takes.

A micro-batch of all ranks is `world_size * batch` places that follow each other.  Which rank takes
which of them changes no sum over ranks, only how long they wait for the one with most to do: so
they are dealt out by their tokens.  With `train.batch_tokens` it is as many places as have so many
tokens together, cut anew in each epoch, and ranks may take unlike numbers of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

from ..types import Sample


@dataclass(frozen=True, slots=True)
class Placed:
    """One sample of the endless sequence."""

    epoch: int
    number: int  # which sample of an epoch it is, the same in every epoch
    index: int  # what a user finds it by: its row in the data set, or in the capture
    sample: Sample | None  # None: the strategy's adapter turned it down
    reached: int | None = None  # as `Turn.reached`


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


class Turn(NamedTuple):
    """A place that a rank takes."""

    place: int
    # in micro-batches of tokens, at the last of one: the samples that all ranks are done with then
    reached: int | None = None
    counts: bool = True  # not where there is none for this rank, and it only keeps step


class Cut(NamedTuple):
    """A rank's turns of one micro-batch of tokens."""

    turns: list[Turn]
    ends: bool  # an epoch, or what is trained on


def windows(
    share: Share,
    position: int,
    size: int,
    look: Callable[[int], tuple[int, int]],
    samples: Callable[[], int],
    *,
    end: int | None = None,
) -> Iterator[tuple[list[Turn], int]]:
    """Yield a rank's turns in groups of `size`, or a little more, and how many of each are done.

    Groups begin at fixed places, as far before `position` as need be, so that a resumed run has the
    same ones.  `look` gives the epoch and the tokens at a place, `samples` how many an epoch has.
    """
    if share.tokens is None:
        ranks = share.world_size
        done = position // ranks % size if position % ranks == 0 else 0
        mine = places(share, position, lambda place: look(place)[1], end=end, back=done)
        while True:
            yield [Turn(place) for place in islice(mine, size)], done
            done = 0
    group: list[Turn] = []
    for cut in _cuts(share, position, look, samples, end):
        group += cut.turns
        reached = cut.turns[-1].reached or 0
        if (len(group) >= size or cut.ends) and reached > position:
            ended = [at for at, turn in enumerate(group) if turn.reached is not None]
            past = [at for at in ended if (group[at].reached or 0) <= position]
            yield group, past[-1] + 1 if past else 0
        if len(group) >= size or cut.ends:
            group = []


def places(
    share: Share,
    position: int,
    tokens: Callable[[int], int],
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
    yield from islice(_of_blocks(blocks, share, tokens, end), own % share.batch, None)


def _of_blocks(
    blocks: Iterator[int], share: Share, tokens: Callable[[int], int], end: int | None
) -> Iterator[int]:
    for first in blocks:
        if end is not None and first + share.block > end:
            yield from range(first + share.rank, first + share.block, share.world_size)
            continue
        sizes = [tokens(place) for place in range(first, first + share.block)]
        yield from (first + at for at in dealt(sizes, share.world_size)[share.rank])


def dealt(sizes: list[int], ranks: int) -> list[list[int]]:
    """Return which of `sizes` each rank takes, as many each: the largest first, to who has least.

    Each rank's are in ascending order.
    """
    batch = len(sizes) // ranks
    taken: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        least = min((r for r in range(ranks) if len(taken[r]) < batch), key=lambda r: (sums[r], r))
        taken[least].append(at)
        sums[least] += sizes[at]
    return [sorted(mine) for mine in taken]


def _cuts(
    share: Share,
    position: int,
    look: Callable[[int], tuple[int, int]],
    samples: Callable[[], int],
    end: int | None,
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
        mine = [Turn(first + at) for at in evenly(sizes, share.world_size)[share.rank]]
        mine = mine or [Turn(first, counts=False)]
        mine[-1] = mine[-1]._replace(reached=place)
        yield Cut(mine, ends or place == end)


def evenly(sizes: list[int], ranks: int) -> list[list[int]]:
    """Return which of `sizes` each rank takes, so that their sums are near each other.

    The largest first, to who has least; then the rank with most gives one to the one with least, or
    swaps one with it, as long as that brings the two together and they are a hundredth apart.  Each
    rank's are in ascending order.
    """
    taken: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        least = min(range(ranks), key=lambda r: (sums[r], r))
        taken[least].append(at)
        sums[least] += sizes[at]
    while True:
        most, least = (pick(range(ranks), key=lambda r: (sums[r], r)) for pick in (max, min))
        gap = sums[most] - sums[least]
        if 100 * gap <= sums[most]:
            return [sorted(mine) for mine in taken]
        given: list[int | None] = [None, *taken[least]]
        swaps = [
            (abs(gap - 2 * (sizes[a] - (0 if b is None else sizes[b]))), a, i)
            for a in taken[most]
            for i, b in enumerate(given)
        ]
        left, a, i = min(swaps, default=(gap, 0, 0))
        if left >= gap:
            return [sorted(mine) for mine in taken]
        b = given[i]
        for rank, out, back in ((most, a, b), (least, b, a)):
            taken[rank] = [at for at in taken[rank] if at != out] + ([] if back is None else [back])
            sums[rank] = sum(sizes[at] for at in taken[rank])
