"""Matrices to float8 on a GPU, with a scale for each row, for each column, or both at once.

By rows alone, a program finds a row's largest magnitude and reads the row again, mostly from a
cache, to write it.  Columns take two passes over tiles: the first finds the largest magnitudes, the
second writes float8, the columns transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
_BLOCK = 4096  # of a row


def narrow(parts: Sequence[Tensor], found: tuple[Tensor, ...], rows: bool, columns: bool) -> None:
    """Fill `found` from matrices [., K], M lines together: by rows, by columns, or both.

    Float8 and its scales: rows [M, K] and [M, 1], columns [K, M or more, then zeros] and [K, 1],
    all contiguous.
    """
    k, m = parts[0].shape[1], sum(len(part) for part in parts)
    begins = accumulate((len(part) for part in parts), initial=0)
    given = [
        (at, part if part.stride(1) == 1 else part.contiguous())
        for at, part in zip(begins, parts, strict=False)
        if part.numel()
    ]
    with torch.cuda.device(parts[0].device):
        if not columns:
            block = min(triton.next_power_of_2(k), _BLOCK)
            for at, x in given:
                _by_rows[len(x),](x, k, x.stride(0), *found, at, BLOCK=block, num_warps=8)
            return
        # as whole numbers magnitudes are ordered alike, and NaN is the largest: so the largest of
        # a line is found by atomics, whose order changes nothing
        sizes = torch.zeros(k + m if rows else k, dtype=torch.int32, device=parts[0].device)
        end = found[-2].shape[1]
        for write, (at, x) in product((False, True), given):
            until = end - at if at + len(x) == m else len(x)  # zeros are written with the last
            _pass[triton.cdiv(k, _TILE), triton.cdiv(until, _TILE)](
                *(x, len(x), k, x.stride(0), at, end, until, sizes, *found[-2:], *found[:2]),
                WRITE=write,
                ROWS=rows,
                TILE=_TILE,
                num_warps=8,
            )


@triton.jit
def _large(size):  # type: ignore[no-untyped-def]
    """The largest magnitude, at least 1e-30, so that zeros have a scale; NaN stays."""
    size = size.to(tl.float32, bitcast=True)
    return tl.where(size < 1e-30, 1e-30, size)


@triton.jit
def _float8(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def _by_rows(x, k, stride, values, scales, at, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    values += (at + row) * k
    size = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, k, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        value = tl.load(x + c, mask=c < k, other=0.0).to(tl.float32)
        size = tl.maximum(size, tl.abs(value).to(tl.int32, bitcast=True))
    large = _large(tl.max(size, 0))
    tl.store(scales + at + row, large / 448.0)
    for begin in range(0, k, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        value = tl.load(x + c, mask=c < k, other=0.0).to(tl.float32)
        tl.store(values + c, _float8(value * (448.0 / large)), mask=c < k)


@triton.jit(do_not_specialize=("m",))  # type: ignore[untyped-decorator]
def _pass(  # type: ignore[no-untyped-def]
    x,  # triton reads annotations itself, and knows no types of ours
    m,
    k,
    stride,
    at,  # the first row's place
    end,  # length of columns
    until,  # specialised: by multiples of 16 columns are written in 16 bytes at once
    sizes,  # of columns [k], then of rows
    columns,
    column_scales,
    rows,  # anything without ROWS
    row_scales,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (r < m)[:, None] & (c < k)[None, :]
    place = r[:, None].to(tl.int64) * stride + c[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if not WRITE:
        size = tl.abs(value).to(tl.int32, bitcast=True)
        tl.atomic_max(sizes + c, tl.max(size, 0), mask=c < k, sem="relaxed")
        if ROWS:
            tl.atomic_max(sizes + k + at + r, tl.max(size, 1), mask=r < m, sem="relaxed")
    else:
        large = _large(tl.load(sizes + c, mask=c < k, other=0))
        if tl.program_id(1) == 0:
            tl.store(column_scales + c, large / 448.0, mask=c < k)
        y = tl.trans(_float8(value * (448.0 / large)[None, :]))
        place = c[:, None].to(tl.int64) * end + at + r[None, :]
        tl.store(columns + place, y, mask=(c < k)[:, None] & (r < until)[None, :])
        if ROWS:
            large = _large(tl.load(sizes + k + at + r, mask=r < m, other=0))
            if tl.program_id(0) == 0:
                tl.store(row_scales + at + r, large / 448.0, mask=r < m)
            place = (at + r)[:, None].to(tl.int64) * k + c[None, :]
            tl.store(rows + place, _float8(value * (448.0 / large)[:, None]), mask=inside)
