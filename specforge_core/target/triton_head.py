"""The best token and the log-sum-exp of each row of logits on a GPU, which reads them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, STAGES = 8192, 8, 3  # of a row at once
GROUP = 8  # columns of which one maximum is kept: as many as a load has of 16 bits each
_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is no NaN


def summarize_logits(
    logits: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return tokens [n] int64 and log-sum-exps [n] float32 of logits [n, V] of 16 or 32 bits.

    Logits are scaled first, then capped.  Of several largest ones the first is the token.  Where
    one is NaN or inf, the first of these is, and the log-sum-exp is NaN.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _summarize[rows,](
            *(logits, tokens, sums, vocab, logits.stride(0), scale),
            CAP=softcap or 0.0,
            GROUP=GROUP,
            GROUPS=BLOCK // GROUP,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return tokens, sums


@triton.jit  # type: ignore[untyped-decorator]
def _logits(place, inside, scale, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32) * scale
    if CAP > 0:
        x = CAP * (2 * tl.sigmoid(2 * x / CAP) - 1)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _size(x):  # type: ignore[no-untyped-def]
    """What x counts as where the largest is looked for, which passes NaN over."""
    return tl.where(x != x, float("inf"), x)


@triton.jit  # type: ignore[untyped-decorator]
def _summarize(  # type: ignore[no-untyped-def]
    logits,  # triton reads annotations itself, and knows no types of ours
    tokens,
    sums,
    vocab,
    stride,
    scale,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A lane keeps the largest of its groups, where that group starts, and one sum."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane, near = tl.arange(0, GROUPS) * GROUP, tl.arange(0, GROUP)
    top = tl.full([GROUPS], _LOWEST, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    where = tl.zeros([GROUPS], tl.int32)
    for start in tl.range(0, vocab, GROUPS * GROUP, num_stages=STAGES):
        c = start + lane[:, None] + near[None, :]
        x = _logits(logits + c, c < vocab, scale, CAP)
        new = tl.maximum(top, tl.max(_size(x), 1))
        where = tl.where(new > top, start + lane, where)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        top = new
    best = tl.max(top, 0)
    tl.store(sums + row, best + tl.log(tl.sum(total * tl.exp(top - best), 0)))
    first = tl.min(tl.where(top == best, where, vocab), 0)
    c = first + near
    x = _logits(logits + c, c < vocab, scale, CAP)
    best_near = tl.min(tl.where(_size(x) == best, near, GROUP), 0)
    # of a row that is -inf throughout none is the best
    tl.store(tokens + row, (first + best_near % GROUP).to(tl.int64))
