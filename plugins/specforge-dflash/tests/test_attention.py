"""All attention paths against a plain softmax over a dense mask."""

from __future__ import annotations

import pytest
import torch
from specforge_dflash.anchored import KEYS, AnchoredMask, _attention, takes
from specforge_dflash.attention import NO_END, TILE, EagerMask, attend, block_mask
from torch import Tensor

from specforge_core.errors import ConfigError
from specforge_core.testing.close import close

# flex attention without compilation is the reference itself; it warns that it is slow
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = [
    # bounds of each row's blocks as (document's start, anchors in the row), context, block, window
    ([[(0, [0, 3, 7])]], 9, 4, None),
    ([[(0, [0, 3, 7])], [(0, [2, 5]), (0, [0])]], 9, 4, None),
    ([[(0, [1, 4, 8])]], 9, 4, 3),
    ([[(0, [1, 4, 30])], [(0, [9]), (0, [0, 0])]], 31, 5, 8),
    ([[(0, sorted(range(3, 300, 11)))]], 301, 16, None),
    ([[(0, sorted(range(3, 300, 11)))]], 301, 16, 40),
    ([[(0, [5, 130, 260, 400])], [(0, [1, 2, 3, 4])]], 512, 64, 100),
    # documents behind each other
    ([[(0, [0, 3]), (5, [5, 7]), (9, [12])]], 14, 4, None),
    ([[(0, [0, 3]), (5, [5, 7]), (9, [12])]], 14, 4, 3),
    ([[(0, [40, 60]), (70, [80]), (250, [260, 400]), (430, [431, 440])]], 450, 16, None),
    ([[(0, [40, 60]), (70, [80]), (250, [260, 400]), (430, [431, 440])]], 450, 16, 50),
    ([[(128 * n, [128 * n + 9, 128 * n + 127]) for n in range(9)]], 1160, 10, None),
    ([[(128 * n, [128 * n + 9, 128 * n + 127]) for n in range(9)]], 1160, 10, 30),
    # causal in their block, however far back
    ([[(0, [1, 4, 30])], [(0, [9]), (0, [0, 0])]], 31, 5, NO_END),
    ([[(0, [40, 60]), (70, [80]), (250, [260, 400]), (430, [431, 440])]], 450, 16, NO_END),
]
Rows = list[list[tuple[int, list[int]]]]


def bounds(rows: Rows) -> tuple[Tensor, Tensor]:
    """Anchors and documents' starts of all blocks, both [b, A]."""
    limits = [[a for _, anchors in row for a in anchors] for row in rows]
    starts = [[start for start, anchors in row for _ in anchors] for row in rows]
    return torch.tensor(limits), torch.tensor(starts)


def dense(rows: Rows, context: int, block: int, window: int | None) -> Tensor:
    """[b, N, S + N] bool, from the definition."""
    limits, starts = bounds(rows)
    b, count = limits.shape
    out = torch.zeros(b, count * block, context + count * block, dtype=torch.bool)
    for row in range(b):
        for i in range(count):
            anchor = int(limits[row, i])
            for k in range(block):
                seen = out[row, i * block + k]
                for j in range(int(starts[row, i]), anchor):
                    seen[j] = window is None or anchor + k - j < window
                for other in range(block):
                    inside = window is None or 0 <= k - other < window
                    seen[context + i * block + other] = inside
    return out


def plain(
    q: Tensor, ctx: tuple[Tensor, Tensor], blk: tuple[Tensor, Tensor], seen: Tensor
) -> Tensor:
    group = q.shape[1] // ctx[0].shape[1]
    k, v = (torch.cat([a, b], 2).repeat_interleave(group, 1) for a, b in zip(ctx, blk, strict=True))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ v


def inputs(
    limits: Tensor,
    context: int,
    block: int,
    dtype: torch.dtype,
    device: str = "cpu",
    heads: tuple[int, int, int] = (4, 2, 16),
) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(context)
    b, slots = len(limits), limits.shape[1] * block
    h, v, d = heads
    shapes = [(h, slots), (v, context), (v, context), (v, slots), (v, slots)]
    return tuple(
        torch.randn(b, count, n, d, generator=gen, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count, n in shapes
    )


@pytest.mark.parametrize(("rows", "context", "block", "window"), CASES)
def test_eager_equals_a_dense_softmax_with_its_gradients(
    rows: Rows, context: int, block: int, window: int | None
) -> None:
    limits, starts = bounds(rows)
    mine = inputs(limits, context, block, torch.float32)
    q, kc, vc, kb, vb = mine
    mask = EagerMask.build(limits, starts, context, block, window)
    out = attend(q, (kc, vc), (kb, vb), mask)
    exact = inputs(limits, context, block, torch.float64)
    q, kc, vc, kb, vb = exact
    want = plain(q, (kc, vc), (kb, vb), dense(rows, context, block, window))
    keys = 16 + context + limits.shape[1] * block  # a head's size, and all there is to sum over
    close(out, want, terms=keys)
    wave = torch.sin(torch.arange(want.numel())).view(want.shape)
    (out * wave).sum().backward()
    (want * wave).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad, terms=keys)


@pytest.mark.parametrize(("rows", "context", "block", "window"), CASES)
def test_flex_equals_eager(rows: Rows, context: int, block: int, window: int | None) -> None:
    limits, starts = bounds(rows)
    with torch.no_grad():
        q, kc, vc, kb, vb = (x.detach() for x in inputs(limits, context, block, torch.float32))
        flex = attend(q, (kc, vc), (kb, vb), block_mask(limits, starts, context, block, window))
        eager = attend(
            q, (kc, vc), (kb, vb), EagerMask.build(limits, starts, context, block, window)
        )
    close(flex, eager, terms=16 + context + limits.shape[1] * block)


@pytest.mark.parametrize(("rows", "context", "block", "window"), CASES)
def test_tiles_skipped_are_empty_and_tiles_unmasked_are_full(
    rows: Rows, context: int, block: int, window: int | None
) -> None:
    limits, starts = bounds(rows)
    mask = block_mask(limits, starts, context, block, window)
    seen = dense(rows, context, block, window)
    more_rows, more_columns = (-n % TILE for n in seen.shape[1:])
    # beyond the end nothing is asked: a tile may be called full or empty whatever is there
    for fill, skipped in ((False, True), (True, False)):
        tiles = torch.nn.functional.pad(seen, (0, more_columns, 0, more_rows), value=fill)
        tiles = tiles.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
        listed = set()
        for kind in ("kv", "full_kv"):
            nums = getattr(mask, f"{kind}_num_blocks")
            indices = getattr(mask, f"{kind}_indices")
            for b, _, i in torch.cartesian_prod(*map(torch.arange, nums.shape)).tolist():
                for j in indices[b, 0, i, : nums[b, 0, i]].tolist():
                    listed.add((b, i, j))
                    if kind == "full_kv" and not skipped:
                        assert tiles[b, i, :, j].all()
        if skipped:
            some = tiles.any(4).any(2)
            assert listed == {tuple(place) for place in some.nonzero().tolist()}


@CUDA
@pytest.mark.gpu
# torch looks at every input of what it compiles, also at those that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("rows", "context", "block", "window"), CASES)
def test_flex_equals_a_dense_softmax_on_a_gpu(
    rows: Rows, context: int, block: int, window: int | None
) -> None:
    torch.compiler.reset()  # this shape alone: compiling for all shapes takes much longer
    limits, starts = bounds(rows)
    mine = inputs(limits, context, block, torch.float32, "cuda")
    q, kc, vc, kb, vb = mine
    out = attend(
        q, (kc, vc), (kb, vb), block_mask(limits.cuda(), starts.cuda(), context, block, window)
    )
    exact = inputs(limits, context, block, torch.float64)
    q, kc, vc, kb, vb = exact
    want = plain(q, (kc, vc), (kb, vb), dense(rows, context, block, window))
    torch.testing.assert_close(out.double().cpu(), want, atol=5e-3, rtol=5e-3)
    wave = torch.sin(torch.arange(want.numel())).view(want.shape)
    (out * wave.cuda()).sum().backward()
    (want * wave).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        error = (a.grad.double().cpu() - b.grad).norm() / b.grad.norm()
        assert error < 5e-3  # the matrix units round float32 to 10 bits


@pytest.mark.parametrize(("rows", "context", "block", "window"), CASES)
def test_stretches_of_slots_and_ranges_of_keys_are_those_of_the_definition(
    rows: Rows, context: int, block: int, window: int | None
) -> None:
    mask = AnchoredMask.build(*bounds(rows), context, block, window)
    seen = dense(rows, context, block, window)[..., :context]
    keys = torch.arange(context)
    assert (seen == (keys >= mask.low[..., None]) & (keys < mask.high[..., None])).all()
    for row in range(len(rows)):
        for tile in range(-(-context // KEYS)):
            some = seen[row, :, tile * KEYS : (tile + 1) * KEYS].any(1).nonzero().flatten() // block
            first, last = mask.ranges[row, tile].tolist()
            if not len(some):
                assert first >= last
            else:
                assert (first, last) == (int(some[0]) * block, int(some[-1] + 1) * block)


HEADS = [(6, 2, 96), (3, 3, 128), (16, 2, 64)]
WIDE = [(8, 1, 256), (5, 1, 200)]
KERNEL_CASES = [
    *((*case, (4, 2, 16), torch.float32, 1e-5) for case in CASES),
    *((*case, (4, 1, 128), torch.bfloat16, 1e-2) for case in CASES),
    *((*CASES[i], heads, torch.float32, 1e-5) for i in (6, 9) for heads in HEADS),
    *((*CASES[i], heads, torch.float16, 1e-2) for i in (6, 10) for heads in HEADS),
    *((*CASES[i], heads, torch.bfloat16, 1e-2) for i in (6, 9) for heads in WIDE),
]


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "context", "block", "window", "heads", "dtype", "most"), KERNEL_CASES, ids=str
)
def test_the_kernels_equal_a_dense_softmax_with_its_gradients(
    rows: Rows,
    context: int,
    block: int,
    window: int | None,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    most: float,
) -> None:
    assert takes(heads[2], block, dtype)
    limits, starts = bounds(rows)
    mine = inputs(limits, context, block, dtype, "cuda", heads)
    mask = AnchoredMask.build(limits.cuda(), starts.cuda(), context, block, window)
    q, kc, vc, kb, vb = mine
    out = attend(q, (kc, vc), (kb, vb), mask)
    again = attend(q, (kc, vc), (kb, vb), mask)
    exact = tuple(x.detach().double().requires_grad_() for x in mine)
    q, kc, vc, kb, vb = exact
    seen = dense(rows, context, block, window).cuda()
    want = plain(q, (kc, vc), (kb, vb), seen)
    wave = torch.sin(torch.arange(want.numel(), device="cuda")).view(want.shape)
    grads = torch.autograd.grad((out.double() * wave).sum(), mine)
    same = torch.autograd.grad((again.double() * wave).sum(), mine)
    wants = torch.autograd.grad((want * wave).sum(), exact)
    for a, b, c in zip((out, *grads), (want, *wants), (again, *same), strict=True):
        assert (a.double() - b).norm() / b.norm() < most
        assert torch.equal(a, c)  # nothing is added up in an order that changes


@CUDA
@pytest.mark.gpu
def test_the_operator_is_what_it_says_to_torch() -> None:
    rows, context, block, window = CASES[9]
    mask = AnchoredMask.build(*(x.cuda() for x in bounds(rows)), context, block, window)
    q, kc, vc, kb, vb = inputs(bounds(rows)[0], context, block, torch.float32, "cuda")
    given = (q, kc, vc, kb, vb, mask.low, mask.high, mask.ranges, block, 0)
    torch.library.opcheck(_attention, given, atol=1e-4, rtol=1e-4)


def test_what_the_kernels_take() -> None:
    assert takes(128, 16, torch.bfloat16)
    assert takes(256, 64, torch.float16)
    assert not takes(256, 16, torch.float32)
    assert not takes(64, 16, torch.float64)
    assert not takes(8, 16, torch.bfloat16)
    assert not takes(64, 65, torch.bfloat16)


def test_flex_on_a_cpu_says_that_it_cannot_train() -> None:
    limits, starts = bounds([[(0, [0, 3])]])
    q, kc, vc, kb, vb = inputs(limits, 9, 4, torch.float32)
    with pytest.raises(ConfigError, match=r"no backward pass on a CPU. Try: strategy.attention"):
        attend(q, (kc, vc), (kb, vb), block_mask(limits, starts, 9, 4, None))


def test_a_packed_row_is_taken_apart_on_a_cpu() -> None:
    """Else its cost would be quadratic in documents: 9 of them cost 9 times one."""
    limits, starts = bounds([[(128 * n, [128 * n + 9, 128 * n + 127]) for n in range(9)]])
    mask = EagerMask.build(limits, starts, 1160, 10, 30)
    assert [(part.blocks, part.begin, part.seen.shape[-1]) for part in mask.parts] == [
        (2, 128 * n, 127) for n in range(9)
    ]
