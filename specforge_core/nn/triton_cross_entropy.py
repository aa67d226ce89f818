"""One pass over a chunk of logits on a GPU: loss, best token, and the gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is no NaN


def cross_entropy_in_place(
    logits: Tensor, labels: Tensor, softcap: float | None, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return losses [n] float32 and best tokens [n] int64 of `logits` [n, V].

    With `want_grad`, `logits` is overwritten by d(loss)/d(logits).
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    with torch.cuda.device(logits.device):
        _kernel[(rows,)](
            logits,
            labels,
            losses,
            best,
            vocab,
            logits.stride(0),
            CAP=softcap or 0.0,
            WANT_GRAD=want_grad,
            BLOCK=4096,
            num_warps=16,
        )
    return losses, best


@triton.jit  # type: ignore[untyped-decorator]
def _capped(x, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    return CAP * (2 * tl.sigmoid(2 * x / CAP) - 1)


@triton.jit(do_not_specialize_on_alignment=("labels",))  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits,  # triton reads annotations itself, and knows no types of ours
    labels,
    losses,
    best,
    vocab,
    stride,
    CAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    lane = tl.arange(0, BLOCK)
    # Read the label's logit first: the reductions below are the barrier between
    # every read of the row and the writes of the second loop.
    label = tl.load(labels + row)
    own = tl.load(base + label).to(tl.float32)
    if CAP > 0:
        own = _capped(own, CAP)
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + lane
        x = tl.load(base + cols, mask=cols < vocab, other=0.0).to(tl.float32)
        if CAP > 0:
            x = _capped(x, CAP)
        x = tl.where(cols < vocab, x, float("-inf"))
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        where = tl.where(x > top, cols, where)
        top = new_top
    row_top = tl.max(top, 0)
    lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    tl.store(best + row, tl.min(tl.where(top == row_top, where, vocab), 0).to(tl.int64))
    tl.store(losses + row, lse - own)
    if WANT_GRAD:
        for start in range(0, vocab, BLOCK):
            cols = start + lane
            x = tl.load(base + cols, mask=cols < vocab, other=0.0).to(tl.float32)
            if CAP > 0:
                x = _capped(x, CAP)
            grad = tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0)
            if CAP > 0:
                grad = grad * (1 - (x / CAP) * (x / CAP))
            tl.store(base + cols, grad.to(logits.dtype.element_ty), mask=cols < vocab)
