"""The kernel of packed attention against float64, for all that it is told of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specforge_core.target.varlen import _one, tiles
from specforge_core.testing.close import close

LENGTHS = [3, 200, 1, 129, 64]


def test_the_longest_work_comes_first_and_every_token_once():
    found = tiles([5, 300, 64, 1], 64)
    assert found.dtype == torch.int32
    assert found[:, 1].tolist() == [256, 192, 128, 64, 0, 0, 0, 0]
    owned = [
        begin + token
        for begin, first, length in found.tolist()
        for token in range(first, min(first + 64, length))
    ]
    assert sorted(owned) == list(range(370))
    assert {(begin, length) for begin, _, length in found.tolist()} == {
        (0, 5),
        (5, 300),
        (305, 64),
        (369, 1),
    }


def rows(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU, whose shared memory its tiles fill")
    draw = torch.Generator().manual_seed(0)
    heads, kv_heads, width, wide = shape
    return [
        torch.randn(sum(LENGTHS), count, size, generator=draw).to(dtype).cuda()
        for count, size in ((heads, width), (kv_heads, width), (kv_heads, wide))
    ]


def attend(given: list[Tensor], sinks: Tensor | None = None, window: int = 0, **other: int):
    from specforge_core.target import triton_varlen

    width = max(given[0].shape[-1], given[2].shape[-1])
    tuning = next(one for most, one in triton_varlen.TUNINGS.items() if width <= most)
    tuning = replace(tuning, **other)
    table = tiles(LENGTHS, triton_varlen.tokens_of_a_tile(tuning, *given[:2])).cuda()
    return triton_varlen.attend(*given, sinks, 0.2, window, table, tuning)


def alone(given: list[Tensor], sinks: Tensor | None = None, window: int = 0) -> Tensor:
    sequences = zip(*(x.double().split(LENGTHS) for x in given), strict=True)
    sinks = None if sinks is None else sinks.double()
    return torch.cat([_one(*x, sinks, 0.2, window) for x in sequences])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 8, 8),
        (4, 4, 32, 24),
        (16, 2, 64, 64),
        (6, 2, 80, 80),
        (2, 1, 96, 96),
        (8, 2, 128, 128),
        (2, 2, 192, 128),
        (4, 1, 256, 256),
    ],
)
def test_heads_of_any_width_are_attended_to(shape: tuple[int, ...], dtype: torch.dtype):
    given = rows(shape, dtype)
    for window in (0, 70):
        close(attend(given, window=window), alone(given, window=window), terms=400)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 31, 64, 128, 199, 1000])
def test_windows_and_sinks_of_any_size(window: int):
    given = rows((8, 2, 128, 128), torch.bfloat16)
    sinks = torch.tensor([-1e4, -3, 0, 0.5, 1, 3, 9, 1e4], device="cuda")
    close(attend(given, sinks, window), alone(given, sinks, window), terms=400)


@pytest.mark.gpu
def test_heads_one_behind_the_other_are_read_as_well():
    given = rows((8, 2, 128, 128), torch.bfloat16)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    assert torch.equal(attend(apart), attend(given))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_nothing_reaches_a_sequence_from_another(heads: int):
    given = rows((8, 2, 128, 128), torch.bfloat16)
    clean = attend(given, heads=heads)
    close(clean, alone(given), terms=400)
    for x in given:
        x[203:204] = torch.nan
    found = attend(given, heads=heads)
    assert found[203].isnan().all()
    others = torch.arange(len(found), device="cuda") != 203
    assert torch.equal(found[others], clean[others])
