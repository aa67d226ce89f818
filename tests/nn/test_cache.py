from __future__ import annotations

import pytest
import torch

from specforge_core.nn.cache import FIRST, GrowingCache


@pytest.mark.parametrize(("shape", "dim"), [((1, 2, 0, 3), 2), ((0, 2, 3), 0), ((2, 0, 3), -2)])
def test_everything_appended_comes_back_in_order(shape: tuple[int, ...], dim: int) -> None:
    cache = GrowingCache(dim)
    draw = torch.Generator().manual_seed(0)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for count in (0, 3, 1, 0, FIRST, 1, 2 * FIRST):
        size = list(shape)
        size[dim] = count
        parts.append((torch.randn(size, generator=draw), torch.randn(size, generator=draw)))
        keys, values = cache.extend(*parts[-1])
        assert torch.equal(keys, torch.cat([k for k, _ in parts], dim))
        assert torch.equal(values, torch.cat([v for _, v in parts], dim))
    assert cache.length == 3 * FIRST + 5
