from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from specforge_core import stop
from specforge_core.batches.loader import Micro
from specforge_core.batches.prefetch import Prefetcher
from specforge_core.train.dist import World
from specforge_core.train.supply import Supply


class Ranks:
    """What a Supply asks of a World: its size, and where ranks meet."""

    def __init__(self, size: int, told: list[str]) -> None:
        self.size, self.told = size, told

    def meeting(self) -> Callable[[], object]:
        self.told.append("joined")
        return lambda: self.told.append("met")


@pytest.mark.parametrize(
    ("ranks", "beside", "expected"),
    [
        (2, True, ["joined", "batch", "met", "batch", "met", "met", "met"]),
        (2, False, ["batch", "batch"]),
        (1, True, ["batch", "batch"]),
    ],
)
def test_a_rank_whose_batch_is_there_waits_for_the_others_on_the_host(
    ranks: int, beside: bool, expected: list[str]
) -> None:
    told: list[str] = []

    def batches() -> Iterator[Micro]:
        for position in (1, 2):
            told.append("batch")
            yield Micro({"input_ids": torch.zeros(1, 1)}, position, 1, 1)
        raise stop.Interrupted(2)

    supply = Supply(
        cast("Prefetcher[Micro]", batches()), cast("World", cast("Any", Ranks(ranks, told))), beside
    )
    # behind the signal, one that is not alone takes part in what the others may have launched
    found = [supply.next() for _ in range(4 if ranks > 1 else 2)]
    assert [micro.num_samples for micro in found if micro is not None] == [1, 1, 0, 0][: len(found)]
    assert told == expected
