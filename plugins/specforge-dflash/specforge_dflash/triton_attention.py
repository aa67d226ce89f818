"""The kernels of attention from block slots to the context and to their own block, on a GPU.

A slot sees one stretch of the context, from `low` to before `high`, whatever made it so:
anchors, documents, a window.  A program of the first two kernels owns some whole blocks and
some query heads of one key/value head, so it holds all that sees those blocks' own keys, and
reads a context key once for all its heads.  The gradients of context keys and values are
gathered, by programs that each own some keys, from the blocks that see any of them; so nothing
is added up by atomics, and equal inputs give equal bits.

Scores are in base 2: log_sum_exp is log2 of the sum of 2^(scale log2(e) q.k).
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is no NaN
_FAR = tl.constexpr(2**30)
# a batch whose lengths are multiples of 16 would have its kernels compiled once more
LENGTHS = ("n", "context")


@triton.jit  # type: ignore[untyped-decorator]
def own_seen(s, t, BLOCK: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of a tile's slots t [1, .] its slots s [., 1] see; the tile holds whole blocks."""
    seen = (s // BLOCK == t // BLOCK) & (t < SLOTS // BLOCK * BLOCK)
    if WINDOW > 0:
        seen = seen & (s >= t) & (s - t < WINDOW)
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def stretch(lo, hi, valid, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the keys that any row sees begin and end, and those that all of them see.

    In whole tiles, but for the end of the first; the second is empty at the end if at all.
    """
    some = hi > lo
    begin = tl.min(tl.where(some, lo, _FAR), 0) // KEYS * KEYS
    end = tl.max(tl.where(some, hi, 0), 0)
    begin = tl.minimum(begin, end)
    full = (tl.max(tl.where(valid, lo, 0), 0) + KEYS - 1) // KEYS * KEYS
    full_end = tl.min(tl.where(valid, hi, _FAR), 0) // KEYS * KEYS
    none = full_end <= full
    last = begin + (end - begin + KEYS - 1) // KEYS * KEYS
    full = tl.where(none, last, full)
    return begin, end, full, tl.where(none, last, full_end)


@triton.jit  # type: ignore[untyped-decorator]
def partly_seen(i, begin, full, full_end, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key where the i-th tile starts that not all rows see wholly."""
    before = (full - begin) // KEYS
    return tl.where(i < before, begin + i * KEYS, full_end + (i - before) * KEYS)


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(base, n, count, stride, D: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load tokens n of [count, D], zeros beyond."""
    lane = tl.arange(0, DP)
    mask = (n < count)[:, None] & (lane < D)[None, :]
    return tl.load(base + n[:, None] * stride + lane[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator]
def forward(  # type: ignore[no-untyped-def]
    q,  # triton reads annotations itself, and knows no types of ours
    kc,
    vc,
    kb,
    vb,
    out,
    lse,
    low,
    high,
    q_b,
    q_h,
    q_n,
    kc_b,
    kc_h,
    kc_n,
    vc_b,
    vc_h,
    vc_n,
    kb_b,
    kb_h,
    kb_n,
    vb_b,
    vb_h,
    vb_n,
    o_b,
    o_h,
    o_n,
    h,
    n,
    context,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output, and the log-sum-exp."""
    packs = h // HEADS
    row, pack = (tl.program_id(0) // packs).to(tl.int64), (tl.program_id(0) % packs).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * (SLOTS // BLOCK * BLOCK)
    kv = pack * HEADS // GROUP
    r, lane, step = tl.arange(0, SLOTS * HEADS), tl.arange(0, DP), tl.arange(0, KEYS)
    s, head = r % SLOTS, pack * HEADS + r // SLOTS
    slot = first + s
    valid = (slot < n) & (s < SLOTS // BLOCK * BLOCK)
    inside = valid[:, None] & (lane < D)[None, :]
    place = row * q_b + head[:, None] * q_h + slot[:, None] * q_n + lane[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    lo = tl.load(low + row * n + slot, mask=valid, other=0)
    hi = tl.load(high + row * n + slot, mask=valid, other=0)

    # every slot sees itself, so the running maximum is finite from here on
    t = tl.arange(0, SLOTS)
    own_k = load_rows(kb + row * kb_b + kv * kb_h, first + t, n, kb_n, D, DP)
    own_v = load_rows(vb + row * vb_b + kv * vb_h, first + t, n, vb_n, D, DP)
    own = tl.dot(query, tl.trans(own_k), input_precision=PRECISION) * scale
    own = tl.where(own_seen(s[:, None], t[None, :], BLOCK, WINDOW, SLOTS), own, _LOWEST)
    top = tl.max(own, 1)
    own_p = tl.exp2(own - top[:, None])
    total = tl.sum(own_p, 1)
    acc = tl.dot(own_p.to(own_v.dtype), own_v, input_precision=PRECISION)

    kc += row * kc_b + kv * kc_h
    vc += row * vc_b + kv * vc_h
    begin, end, full, full_end = stretch(lo, hi, valid, KEYS)
    for start in range(full, full_end, KEYS):
        k = load_rows(kc, start + step, context, kc_n, D, DP)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(vc, start + step, context, vc_n, D, DP)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new
    partly = (full - begin + tl.maximum(end - full_end, 0) + KEYS - 1) // KEYS
    for i in range(0, partly):
        keys = partly_seen(i, begin, full, full_end, KEYS) + step
        k = load_rows(kc, keys, context, kc_n, D, DP)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(vc, keys, context, vc_n, D, DP)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new

    place = row * o_b + head[:, None] * o_h + slot[:, None] * o_n + lane[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (row * h + head) * n + slot, top + tl.log2(total), mask=valid)
