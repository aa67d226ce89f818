"""Which samples of the endless sequence a rank takes.

A micro-batch of all ranks is `world_size * batch` places that follow each other.  Which rank takes
which of them changes no sum over ranks, only how long they wait for the one with most to do: so
they are dealt out by their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from ..types import Sample


@dataclass(frozen=True, slots=True)
class Placed:
    """One sample of the endless sequence."""

    epoch: int
    number: int  # which sample of an epoch it is, the same in every epoch
    index: int  # what a user finds it by: its row in the data set, or in the capture
    sample: Sample | None  # None: the strategy's adapter turned it down


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data one rank sees, and in which order."""

    rank: int
    world_size: int
    seed: int
    window: int | None = None  # samples that are shuffled together; None: all
    first: int | None = None  # the same in the first epoch, where it is another
    batch: int = 1  # samples of a micro-batch, among which ranks are balanced

    @property
    def block(self) -> int:
        """The samples of all ranks' micro-batches."""
        return self.world_size * self.batch


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
