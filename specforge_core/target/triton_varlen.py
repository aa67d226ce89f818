"""Attention of packed sequences on a GPU, forward alone: causal, windows, sinks, grouped heads.

A program owns some tokens of one sequence and some query heads of one key/value head, so that it
reads a key once for all of these.  Where a program's tokens stand comes in a table, the longest
work first; lengths are nothing that a kernel is compiled for.  Nothing is added up by atomics, so
equal inputs give equal bits.

Shapes: T tokens of all sequences, Hq heads of queries, Hk of keys and values, D and Dv wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is no NaN


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a program holds, and how it runs.

    `rows` are tokens times heads, of which `heads` at most are of one token; a thread has at most
    so many `registers`, by which two programs fit on a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    heads: int = 4
    registers: int | None = None


# on Hopper, by the width that they fit; measured there alone, so elsewhere torch's kernel is used
TUNINGS = {
    64: Tuning(128, 64, 8, 3),
    128: Tuning(128, 32, 8, 3, registers=128),
    256: Tuning(128, 64, 8, 2),
}


def tuning_for(query: Tensor, value: Tensor) -> Tuning | None:
    """Return how these run fast, None where the kernel is not made for them."""
    hopper = torch.version.cuda and torch.cuda.get_device_capability(query.device)[0] == 9
    if query.element_size() != 2 or not hopper:  # AMD's have such numbers, too
        return None
    width = max(query.shape[-1], value.shape[-1])
    return next((tuning for most, tuning in TUNINGS.items() if width <= most), None)


def heads_together(tuning: Tuning, group: int) -> int:
    """Return how many of a key/value head's `group` query heads share a program."""
    heads = 1
    while group % (2 * heads) == 0 and 2 * heads <= tuning.heads:
        heads *= 2
    return heads


def tokens_of_a_tile(tuning: Tuning, query: Tensor, key: Tensor) -> int:
    """Return how many tokens of [T, Hq, D] and [T, Hk, D] a program owns."""
    return tuning.rows // heads_together(tuning, query.shape[1] // key.shape[1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    table: Tensor,
    tuning: Tuning,
) -> Tensor:
    """Return [T, Hq, Dv] for [T, Hq, D], [T, Hk, D] and [T, Hk, Dv] of 16 bits a number.

    `table` is that of `varlen.tiles` for `tokens_of_a_tile`, on the device.  `scale` is
    positive, `window` 0 where a token sees all before it; `sinks` are [Hq].
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    count, all_heads, width = query.shape
    group, wide = all_heads // key.shape[1], value.shape[-1]
    heads = heads_together(tuning, group)
    first = 1 << (width.bit_length() - 1)  # heads of 192 are read as 128 and 64 wide
    rest = width - first
    out = query.new_empty(count, all_heads, wide)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _forward[len(table), all_heads // heads](
            *(query, key, value, out if sinks is None else sinks, out, table),
            *(stride for x in (query, key, value, out) for stride in x.stride()[:2]),
            scale * LOG2E,
            GROUP=group,
            HEADS=heads,
            TOKENS=tuning.rows // heads,
            KEYS=tuning.keys,
            D=width,
            D1=max(first, 16),
            D2=max(triton.next_power_of_2(rest), 16) if rest else 0,
            DV=wide,
            DVP=max(triton.next_power_of_2(wide), 16),
            WINDOW=window,
            SINKS=sinks is not None,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **({} if tuning.registers is None else {"maxnreg": tuning.registers}),
        )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _load(lines, some, FROM: tl.constexpr, TO: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load [., WIDE] FROM a column on of where lines begin; zeros from column TO on."""
    lane = FROM + tl.arange(0, WIDE)
    mask = some[:, None] & (lane < TO)[None, :]
    return tl.load(lines[:, None] + lane[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q,  # triton reads annotations itself, and knows no types of ours
    k,
    v,
    sinks,
    out,
    table,
    q_n,
    q_h,
    k_n,
    k_h,
    v_n,
    v_h,
    o_n,
    o_h,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    # all tiles of some heads before those of others: their keys stay in the second cache
    entry = table + tl.program_id(0) * 3
    begin, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    head = tl.program_id(1) * HEADS
    kv = head // GROUP
    row = tl.arange(0, TOKENS * HEADS)
    token, valid = first + row // HEADS, first + row // HEADS < count
    line = (begin + first).to(tl.int64)
    q_lines = q + line * q_n + head.to(tl.int64) * q_h + row // HEADS * q_n + row % HEADS * q_h
    q1 = _load(q_lines, valid, 0, D, D1)
    q2 = _load(q_lines, valid, D1, D, D2) if D2 > 0 else q1
    k += begin.to(tl.int64) * k_n + kv.to(tl.int64) * k_h
    v += begin.to(tl.int64) * v_n + kv.to(tl.int64) * v_h
    acc = tl.zeros([TOKENS * HEADS, DVP], tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    top = tl.full([TOKENS * HEADS], _LOWEST, tl.float32)
    lane = tl.arange(0, KEYS)

    # keys that some rows see begin at low, those that all see at full, and end at full_end
    low, full, full_end = first * 0, first * 0, first // KEYS * KEYS
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
        full = (tl.maximum(first + TOKENS - WINDOW, 0) + KEYS - 1) // KEYS * KEYS
        full = tl.minimum(full, full_end)
    for start in tl.range(low, tl.minimum(first + TOKENS, count), KEYS):
        inside = start + lane < count  # what lies behind a sequence may be NaN
        k_lines = k + start * k_n.to(tl.int64) + lane * k_n
        scores = tl.dot(q1, tl.trans(_load(k_lines, inside, 0, D, D1)))
        if D2 > 0:
            scores = tl.dot(q2, tl.trans(_load(k_lines, inside, D1, D, D2)), scores)
        if (start < full) | (start >= full_end):
            apart = token[:, None] - (start + lane)[None, :]
            seen = (apart >= 0) & (apart < WINDOW) if WINDOW > 0 else apart >= 0
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        values = _load(v + start * v_n.to(tl.int64) + lane * v_n, inside, 0, DV, DVP)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
        top = new
    if SINKS:  # where this is infinite, a sink has all the weight there is
        sink = tl.load(sinks + head + row % HEADS).to(tl.float32) * _LOG2E
        total += tl.exp2(sink - top)
    o_lines = out + line * o_n + head.to(tl.int64) * o_h + row // HEADS * o_n + row % HEADS * o_h
    column = tl.arange(0, DVP)
    mask = valid[:, None] & (column < DV)[None, :]
    acc = acc / total[:, None]
    tl.store(o_lines[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
