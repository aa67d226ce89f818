"""Matrices to float8 on a GPU, with a scale for each row, for each column, or both at once.

Two passes over tiles: the first finds the largest magnitudes of rows and columns, the second
writes float8, the columns transposed.  So a matrix is read twice for all it is needed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128


def narrow(
    parts: Sequence[Tensor],
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill `rows` and `columns`, each float8 and its scales, from matrices below each other.

    parts [., K] are M lines together; rows [M, K] and [M, 1], columns [K, M or more, then zeros]
    and [K, 1].
    """
    device, k = parts[0].device, parts[0].shape[1]
    m = sum(len(part) for part in parts)
    # as whole numbers magnitudes are ordered alike, and NaN is the largest: so the largest of a
    # line is found by atomics, whose order changes nothing
    found = torch.zeros(k + m, dtype=torch.int32, device=device)
    values, scales = rows or (found, found)
    long, long_scales = columns or (found[None], found)
    end, stride = (long.shape[1], long.stride(0)) if columns else (m, 0)
    begins = accumulate((len(part) for part in parts), initial=0)
    given = [(at, x) for at, x in zip(begins, parts, strict=False) if len(x)]
    with torch.cuda.device(device):
        for write, (at, part) in product((False, True), given):
            x = part if part.stride(1) == 1 else part.contiguous()
            # zeros behind the last row are written with it
            until = end - at if at + len(x) == m else len(x)
            _pass[triton.cdiv(k, _TILE), triton.cdiv(until, _TILE)](
                *(x, found, found[k + at :], len(x), k, x.stride(0), values[at:], scales[at:]),
                *(long[:, at:], long_scales, stride, until),
                WRITE=write,
                ROWS=rows is not None,
                COLUMNS=columns is not None,
                TILE=_TILE,
                num_warps=8,
            )


@triton.jit
def _largest(found, i, count):  # type: ignore[no-untyped-def]
    """The largest magnitude of lines i, at least 1e-30, so that zeros have a scale; NaN stays."""
    size = tl.load(found + i, mask=i < count, other=0).to(tl.float32, bitcast=True)
    return tl.where(size < 1e-30, 1e-30, size)


@triton.jit
def _float8(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=("m",),
    do_not_specialize_on_alignment=("of_rows", "row_scales"),
)
def _pass(  # type: ignore[no-untyped-def]
    x,  # triton reads annotations itself, and knows no types of ours
    of_columns,
    of_rows,
    m,
    k,
    stride,
    rows,
    row_scales,
    columns,
    column_scales,
    column_stride,
    until,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (r < m)[:, None] & (c < k)[None, :]
    place = r[:, None].to(tl.int64) * stride + c[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value).to(tl.int32, bitcast=True)
    if ROWS and not WRITE:
        tl.atomic_max(of_rows + r, tl.max(size, 1), mask=r < m, sem="relaxed")
    if COLUMNS and not WRITE:
        tl.atomic_max(of_columns + c, tl.max(size, 0), mask=c < k, sem="relaxed")
    if ROWS and WRITE:
        large = _largest(of_rows, r, m)
        if tl.program_id(0) == 0:
            tl.store(row_scales + r, large / 448.0, mask=r < m)
        place = r[:, None].to(tl.int64) * k + c[None, :]
        tl.store(rows + place, _float8(value * (448.0 / large)[:, None]), mask=inside)
    if COLUMNS and WRITE:
        large = _largest(of_columns, c, k)
        if tl.program_id(1) == 0:
            tl.store(column_scales + c, large / 448.0, mask=c < k)
        y = tl.trans(_float8(value * (448.0 / large)[None, :]))
        place = c[:, None].to(tl.int64) * column_stride + r[None, :]
        tl.store(columns + place, y, mask=(c < k)[:, None] & (r < until)[None, :])
