"""The backward kernels of triton_attention.py, which says what they share.

The gradients of context keys and values are gathered by programs that each own some keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attention import LENGTHS, load_rows, own_seen, partly_seen, stretch

_FAR = tl.constexpr(2**30)


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator]
def queries(  # type: ignore[no-untyped-def]
    d_out,
    q,
    kc,
    vc,
    kb,
    vb,
    out,
    lse,
    low,
    high,
    delta,
    d_q,
    d_kb,
    d_vb,
    g_b,
    g_h,
    g_n,
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
    dq_b,
    dq_h,
    dq_n,
    dk_b,
    dk_h,
    dk_n,
    h,
    n,
    context,
    factor,
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
    """Gradients of queries and of the blocks' keys and values; `delta` for the kernel below."""
    packs = h // HEADS
    row, pack = (tl.program_id(0) // packs).to(tl.int64), (tl.program_id(0) % packs).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * (SLOTS // BLOCK * BLOCK)
    kv = pack * HEADS // GROUP
    r, lane, step = tl.arange(0, SLOTS * HEADS), tl.arange(0, DP), tl.arange(0, KEYS)
    s, head = r % SLOTS, pack * HEADS + r // SLOTS
    slot = first + s
    valid = (slot < n) & (s < SLOTS // BLOCK * BLOCK)
    inside = valid[:, None] & (lane < D)[None, :]
    scale = factor * 1.4426950408889634
    place = row * o_b + head[:, None] * o_h + slot[:, None] * o_n + lane[None, :]
    result = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    place = row * g_b + head[:, None] * g_h + slot[:, None] * g_n + lane[None, :]
    grad = tl.load(d_out + place, mask=inside, other=0.0)
    drop = tl.sum(result * grad.to(tl.float32), 1)
    sums = (row * h + head) * n + slot
    tl.store(delta + sums, drop, mask=valid)
    place = row * q_b + head[:, None] * q_h + slot[:, None] * q_n + lane[None, :]
    query = tl.load(q + place, mask=inside, other=0.0)
    top = tl.load(lse + sums, mask=valid, other=0.0)
    lo = tl.load(low + row * n + slot, mask=valid, other=0)
    hi = tl.load(high + row * n + slot, mask=valid, other=0)

    t = tl.arange(0, SLOTS)
    own_k = load_rows(kb + row * kb_b + kv * kb_h, first + t, n, kb_n, D, DP)
    own_v = load_rows(vb + row * vb_b + kv * vb_h, first + t, n, vb_n, D, DP)
    own = tl.dot(query, tl.trans(own_k), input_precision=PRECISION) * scale
    seen_own = own_seen(s[:, None], t[None, :], BLOCK, WINDOW, SLOTS) & valid[:, None]
    own_p = tl.where(seen_own, tl.exp2(own - top[:, None]), 0.0)
    own_d = tl.dot(grad, tl.trans(own_v), input_precision=PRECISION)
    own_d = (own_p * (own_d - drop[:, None])).to(own_k.dtype)
    acc = tl.dot(own_d, own_k, input_precision=PRECISION)
    own_d_k = tl.dot(tl.trans(own_d), query, input_precision=PRECISION) * factor
    own_d_v = tl.dot(tl.trans(own_p.to(own_v.dtype)), grad, input_precision=PRECISION)
    place = row * dk_b + pack * dk_h + (first + t)[:, None] * dk_n + lane[None, :]
    mine = ((first + t < n) & (t < SLOTS // BLOCK * BLOCK))[:, None] & (lane < D)[None, :]
    tl.store(d_kb + place, own_d_k.to(d_kb.dtype.element_ty), mask=mine)
    tl.store(d_vb + place, own_d_v.to(d_vb.dtype.element_ty), mask=mine)

    kc += row * kc_b + kv * kc_h
    vc += row * vc_b + kv * vc_h
    begin, end, full, full_end = stretch(lo, hi, valid, KEYS)
    for start in range(full, full_end, KEYS):
        k = load_rows(kc, start + step, context, kc_n, D, DP)
        v = load_rows(vc, start + step, context, vc_n, D, DP)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        d_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(scores - top[:, None])
        d_s = (p * (d_p - drop[:, None])).to(k.dtype)
        acc = tl.dot(d_s, k, acc, input_precision=PRECISION)
    partly = (full - begin + tl.maximum(end - full_end, 0) + KEYS - 1) // KEYS
    for i in range(0, partly):
        keys = partly_seen(i, begin, full, full_end, KEYS) + step
        k = load_rows(kc, keys, context, kc_n, D, DP)
        v = load_rows(vc, keys, context, vc_n, D, DP)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        d_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        p = tl.where(seen, tl.exp2(scores - top[:, None]), 0.0)
        d_s = (p * (d_p - drop[:, None])).to(k.dtype)
        acc = tl.dot(d_s, k, acc, input_precision=PRECISION)
    place = row * dq_b + head[:, None] * dq_h + slot[:, None] * dq_n + lane[None, :]
    tl.store(d_q + place, (acc * factor).to(d_q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*LENGTHS, "entries"))  # type: ignore[untyped-decorator]
def keys(  # type: ignore[no-untyped-def]
    d_out,
    q,
    kc,
    vc,
    lse,
    low,
    high,
    delta,
    ranges,
    d_kc,
    d_vc,
    g_b,
    g_h,
    g_n,
    q_b,
    q_h,
    q_n,
    kc_b,
    kc_h,
    kc_n,
    vc_b,
    vc_h,
    vc_n,
    dk_b,
    dk_h,
    dk_n,
    h,
    n,
    context,
    factor,
    entries,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the context's keys and values, from the slots that see any of them."""
    packs = h // HEADS
    row, pack = (tl.program_id(0) // packs).to(tl.int64), (tl.program_id(0) % packs).to(tl.int64)
    first = tl.program_id(1) * KEYS
    kv = pack * HEADS // GROUP
    r, lane, key = tl.arange(0, SLOTS * HEADS), tl.arange(0, DP), first + tl.arange(0, KEYS)
    s, head = r % SLOTS, pack * HEADS + r // SLOTS
    scale = factor * 1.4426950408889634
    k = load_rows(kc + row * kc_b + kv * kc_h, key, context, kc_n, D, DP)
    v = load_rows(vc + row * vc_b + kv * vc_h, key, context, vc_n, D, DP)
    entry = first // 64 + tl.arange(0, (KEYS + 63) // 64)
    place = ranges + (row * entries + entry) * 2
    begin = tl.min(tl.load(place, mask=entry < entries, other=_FAR), 0)
    end = tl.max(tl.load(place + 1, mask=entry < entries, other=0), 0)

    q += row * q_b + head[:, None] * q_h + lane[None, :]
    d_out += row * g_b + head[:, None] * g_h + lane[None, :]
    sums = (row * h + head) * n
    acc_k = tl.zeros([KEYS, DP], tl.float32)
    acc_v = tl.zeros([KEYS, DP], tl.float32)
    for start in range(begin, end, SLOTS):
        slot = start + s
        valid = slot < n
        inside = valid[:, None] & (lane < D)[None, :]
        query = tl.load(q + slot[:, None] * q_n, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(query), input_precision=PRECISION) * scale
        top = tl.load(lse + sums + slot, mask=valid, other=0.0)
        lo = tl.load(low + row * n + slot, mask=valid, other=0)
        hi = tl.load(high + row * n + slot, mask=valid, other=0)
        seen = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
        p = tl.where(seen, tl.exp2(scores - top[None, :]), 0.0)
        grad = tl.load(d_out + slot[:, None] * g_n, mask=inside, other=0.0)
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        drop = tl.load(delta + sums + slot, mask=valid, other=0.0)
        d_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        d_s = (p * (d_p - drop[None, :])).to(query.dtype)
        acc_k = tl.dot(d_s, query, acc_k, input_precision=PRECISION)
    place = row * dk_b + pack * dk_h + key[:, None] * dk_n + lane[None, :]
    mine = (key < context)[:, None] & (lane < D)[None, :]
    tl.store(d_kc + place, (acc_k * factor).to(d_kc.dtype.element_ty), mask=mine)
    tl.store(d_vc + place, acc_v.to(d_vc.dtype.element_ty), mask=mine)
