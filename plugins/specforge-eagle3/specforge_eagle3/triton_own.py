"""The own terms of training-time test on a GPU: merged into a causal attention's output.

One program per token and key/value head.  Shapes: N tokens, h heads, v key/value heads of
g = h / v heads each, d head size, i own terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def merge(
    q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return output [N, h, d] and log-sum-exp [h, N] with keys and values [i, N, v, d] added."""
    merged, total = torch.empty_like(out), torch.empty_like(lse)
    terms, n, kv_heads, d = keys.shape
    group = q.shape[1] // kv_heads
    with torch.cuda.device(q.device):
        _merge[(n, kv_heads)](
            *(q, out, lse, keys, values, merged, total, n, terms, d**-0.5),
            KV=kv_heads,
            G=group,
            GP=triton.next_power_of_2(group),
            D=d,
            DP=triton.next_power_of_2(d),
            num_warps=1,  # one token and its few heads are small: no exchange between warps
        )
    return merged, total


def merge_backward(
    d_q: Tensor,
    d_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_q with the own terms' part added in place, and the keys' and values' gradients."""
    terms, n, kv_heads, d = keys.shape
    group = q.shape[1] // kv_heads
    d_q, d_keys, d_values = d_q.contiguous(), torch.empty_like(keys), torch.empty_like(values)
    with torch.cuda.device(q.device):
        _merge_backward[(n, kv_heads)](
            *(d_q, d_out, q, out, lse, keys, values, d_keys, d_values, n, terms, d**-0.5),
            KV=kv_heads,
            G=group,
            GP=triton.next_power_of_2(group),
            D=d,
            DP=triton.next_power_of_2(d),
            num_warps=1,  # one token and its few heads are small: no exchange between warps
        )
    return d_q, d_keys, d_values


@triton.jit(do_not_specialize=("n", "terms"))  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    q,  # triton reads annotations itself, and knows no types of ours
    out,
    lse,
    keys,
    values,
    merged,
    total,
    n,  # of any length, and any number of terms: each kernel is compiled once
    terms,
    scale,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane = tl.arange(0, GP), tl.arange(0, DP)
    heads = (kv * G + g)[:, None]
    mask = (g < G)[:, None] & (lane < D)[None, :]
    place = (row * KV * G + heads) * D + lane[None, :]
    q_ = tl.load(q + place, mask=mask, other=0.0).to(tl.float32) * scale
    acc = tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    sums = (kv * G + g) * n + row
    top = tl.load(lse + sums, mask=g < G, other=0.0)
    norm = tl.full([GP], 1.0, tl.float32)
    for i in range(terms):
        own = ((i * n + row) * KV + kv) * D + lane
        k = tl.load(keys + own, mask=lane < D, other=0.0).to(tl.float32)
        v = tl.load(values + own, mask=lane < D, other=0.0).to(tl.float32)
        score = tl.sum(q_ * k[None, :], 1)
        new_top = tl.maximum(top, score)
        shrink, grow = tl.exp(top - new_top), tl.exp(score - new_top)
        acc = acc * shrink[:, None] + grow[:, None] * v[None, :]
        norm = norm * shrink + grow
        top = new_top
    tl.store(merged + place, (acc / norm[:, None]).to(merged.dtype.element_ty), mask=mask)
    tl.store(total + sums, top + tl.log(norm), mask=g < G)


@triton.jit(do_not_specialize=("n", "terms"))  # type: ignore[untyped-decorator]
def _merge_backward(  # type: ignore[no-untyped-def]
    d_q,
    d_out,
    q,
    out,
    lse,
    keys,
    values,
    d_keys,
    d_values,
    n,  # of any length, and any number of terms: each kernel is compiled once
    terms,
    scale,
    KV: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane = tl.arange(0, GP), tl.arange(0, DP)
    heads = (kv * G + g)[:, None]
    mask = (g < G)[:, None] & (lane < D)[None, :]
    place = (row * KV * G + heads) * D + lane[None, :]
    q_ = tl.load(q + place, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(d_out + place, mask=mask, other=0.0).to(tl.float32)
    drop = tl.sum(slope * tl.load(out + place, mask=mask, other=0.0).to(tl.float32), 1)
    total = tl.load(lse + (kv * G + g) * n + row, mask=g < G, other=0.0)
    acc = tl.load(d_q + place, mask=mask, other=0.0).to(tl.float32)
    for i in range(terms):
        own = ((i * n + row) * KV + kv) * D + lane
        k = tl.load(keys + own, mask=lane < D, other=0.0).to(tl.float32)
        v = tl.load(values + own, mask=lane < D, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(q_ * k[None, :], 1) * scale - total)
        weight = tl.where(g < G, weight, 0.0)
        d_score = weight * (tl.sum(slope * v[None, :], 1) - drop) * scale
        acc += d_score[:, None] * k[None, :]
        d_k = tl.sum(d_score[:, None] * q_, 0)
        d_v = tl.sum(weight[:, None] * slope, 0)
        tl.store(d_keys + own, d_k.to(d_keys.dtype.element_ty), mask=lane < D)
        tl.store(d_values + own, d_v.to(d_values.dtype.element_ty), mask=lane < D)
    tl.store(d_q + place, acc.to(d_q.dtype.element_ty), mask=mask)
