"""Launches the kernels of triton_attention.py, with tiles that fit the shape.

Shapes: b rows, S context, N slots, h heads, v key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import triton_attention_backward as gradients
from .anchored import by_token
from .triton_attention import forward as forward_kernel

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tuning:
    """Rows (slots times heads) and keys that a program holds, its warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tunings:
    """Of the three kernels; `heads` of one key/value head in a program of the last."""

    forward: Tuning
    queries: Tuning
    keys: Tuning
    heads: int = 1


# by head size and bytes of a number; measured on an H100 for 128 and bfloat16
USUAL = Tunings(Tuning(64, 64, 4, 2), Tuning(64, 64, 4, 2), Tuning(64, 64, 4, 2), 2)
LARGE = Tunings(Tuning(64, 32, 4, 2), Tuning(64, 32, 8, 1), Tuning(32, 64, 8, 1))  # heads of 256
EXACT = Tunings(Tuning(64, 32, 4, 1), Tuning(64, 32, 4, 1), Tuning(32, 32, 4, 1))  # float32


def tunings(q: Tensor) -> Tunings:
    """Return what fits the head size and the dtype."""
    if q.element_size() > 2:
        return EXACT
    return USUAL if q.shape[-1] <= 128 else LARGE


def heads_together(group: int, rows: int, least: int) -> int:
    """Return how many of a key/value head's `group` query heads share a tile of `rows`.

    A power of two that divides the group and leaves `least` slots, and 16 at any rate.
    """
    heads = 1
    while group % (2 * heads) == 0 and rows // (2 * heads) >= max(least, 16):
        heads *= 2
    return heads


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of row, head and token of [b, heads, n, d]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(q: Tensor, kv_heads: int, tuning: Tuning, block: int) -> tuple[int, int, tuple[int, int]]:
    """Return heads and slots of a tile, and the grid: head packs of all rows, then tiles."""
    b, h, n, _ = q.shape
    heads = heads_together(h // kv_heads, tuning.rows, block)
    slots = tuning.rows // heads
    tiles = triton.cdiv(n, slots // block * block)
    return heads, slots, (b * (h // heads), tiles)


def forward(
    q: Tensor,
    context_kv: tuple[Tensor, Tensor],
    block_kv: tuple[Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    block: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return [b, h, N, d] and log_sum_exp [b, h, N]; `bounds` low and high [b, N] int32.

    `window` 0 is none: slots see all of their own block.
    """
    q, kc, vc, kb, vb = map(_dense, (q, *context_kv, *block_kv))
    tuning = tunings(q).forward
    heads, slots, grid = _tile(q, kc.shape[1], tuning, block)
    out = by_token(q, q.shape[1], q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[grid](
        *(q, kc, vc, kb, vb, out, lse, *bounds),
        *_strides(q, kc, vc, kb, vb, out),
        *(q.shape[1], q.shape[2], kc.shape[2], q.shape[-1] ** -0.5 * LOG2E),
        GROUP=q.shape[1] // kc.shape[1],
        HEADS=heads,
        SLOTS=slots,
        BLOCK=block,
        WINDOW=window,
        D=q.shape[-1],
        DP=triton.next_power_of_2(q.shape[-1]),
        KEYS=tuning.keys,
        PRECISION="tf32x3",
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    context_kv: tuple[Tensor, Tensor],
    block_kv: tuple[Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    ranges: Tensor,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, of the context's keys and values, and of the blocks'.

    `ranges` [b, S / 64 rounded up, 2] int32: from which to before which slot any of 64
    context keys is seen.
    """
    d_out, q, kc, vc, kb, vb = map(_dense, (d_out, q, *context_kv, *block_kv))
    out, lse = result
    chosen, (b, h, n, d), kv_heads = tunings(q), q.shape, kc.shape[1]
    padded = triton.next_power_of_2(d)
    same = {"GROUP": h // kv_heads, "D": d, "DP": padded, "PRECISION": "tf32x3"}
    sizes = (h, n, kc.shape[2], d**-0.5)
    delta, tuning = torch.empty_like(lse), chosen.queries
    heads, slots, grid = _tile(q, kv_heads, tuning, block)
    parts = h // kv_heads // heads  # of which the gradients of one key/value head are the sum
    d_q = by_token(q, h, q.dtype)
    narrow = q.dtype if parts == 1 else torch.float32
    d_kb, d_vb = (by_token(kb, kv_heads * parts, narrow) for _ in range(2))
    gradients.queries[grid](
        *(d_out, q, kc, vc, kb, vb, out, lse, *bounds, delta, d_q, d_kb, d_vb),
        *_strides(d_out, q, kc, vc, kb, vb, out, d_q, d_kb),
        *sizes,
        HEADS=heads,
        SLOTS=slots,
        BLOCK=block,
        WINDOW=window,
        KEYS=tuning.keys,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **same,
    )
    d_kb, d_vb = (_sum(x, parts, q.dtype) for x in (d_kb, d_vb))

    tuning = chosen.keys
    heads = min(heads_together(h // kv_heads, tuning.rows, 16), chosen.heads)
    parts = h // kv_heads // heads
    narrow = q.dtype if parts == 1 else torch.float32
    d_kc, d_vc = (by_token(kc, kv_heads * parts, narrow) for _ in range(2))
    gradients.keys[(b * (h // heads), triton.cdiv(kc.shape[2], tuning.keys))](
        *(d_out, q, kc, vc, lse, *bounds, delta, ranges, d_kc, d_vc),
        *_strides(d_out, q, kc, vc, d_kc),
        *(*sizes, ranges.shape[1]),
        HEADS=heads,
        SLOTS=tuning.rows // heads,
        KEYS=tuning.keys,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **same,
    )
    return d_q, _sum(d_kc, parts, q.dtype), _sum(d_vc, parts, q.dtype), d_kb, d_vb


def _sum(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Return [b, v, n, d] of the parts [b, v * parts, n, d]."""
    if parts == 1:
        return x
    b, heads, n, d = x.shape
    grouped = x.transpose(1, 2).view(b, n, heads // parts, parts, d)
    return grouped.sum(3, dtype=dtype).transpose(1, 2)
