"""A chunk of student logits against their teacher's on a GPU: losses, and gradients in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .soft_loss import SoftLoss

_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two is no NaN
_KINDS = {"cross_entropy": 0, "log_overlap": 1, "hybrid": 2}


def soft_cross_entropy_in_place(
    logits: Tensor,
    teacher: Tensor,
    weights: Tensor,
    logsumexp: Tensor | None,
    loss: SoftLoss,
    softcaps: tuple[float | None, float | None],
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, overlaps and best tokens, each [u, R], of `logits` [u * R, V].

    `teacher` [u, V] are logits too; `softcaps` are of the student's and of the teacher's, and
    `logsumexp` [u] of the teacher's whole vocabulary, of which V may be a part.
    With `want_grad`, `logits` is overwritten by d(loss)/d(logits) times the row's weight.
    """
    rows, vocab = logits.shape
    labels, students = weights.shape
    assert logits.stride(1) == teacher.stride(1) == weights.stride(1) == 1
    assert weights.stride(0) == students
    totals = torch.empty(labels, device=logits.device, dtype=torch.float32)
    entropies, known = torch.empty_like(totals), torch.empty_like(totals)
    losses = torch.empty(labels, students, device=logits.device, dtype=torch.float32)
    overlaps, best = torch.empty_like(losses), torch.empty_like(losses, dtype=torch.int64)
    own_cap, cap = (value or 0.0 for value in softcaps)
    with torch.cuda.device(logits.device):
        _teacher[(labels,)](
            teacher,
            totals if logsumexp is None else logsumexp,  # of no use there where it is none
            totals,
            entropies,
            known,
            vocab,
            teacher.stride(0),
            CAP=cap,
            WHOLE=logsumexp is None,
            BLOCK=4096,
            num_warps=16,
        )
        _student[(rows,)](
            *(logits, teacher, totals, entropies, known, weights, losses, overlaps, best),
            *(students, vocab, logits.stride(0), teacher.stride(0)),
            loss.scale,
            loss.decay,
            OWN_CAP=own_cap,
            CAP=cap,
            KIND=_KINDS[loss.objective],
            WANT_GRAD=want_grad,
            BLOCK=4096,
            num_warps=16,
        )
    return losses, overlaps, best


@triton.jit  # type: ignore[untyped-decorator]
def _load(base, cols, vocab, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in float32, -inf beyond the vocabulary."""
    x = tl.load(base + cols, mask=cols < vocab, other=0.0).to(tl.float32)
    if CAP > 0:
        x = CAP * (2 * tl.sigmoid(2 * x / CAP) - 1)
    return tl.where(cols < vocab, x, float("-inf"))


@triton.jit(do_not_specialize_on_alignment=("logsumexp",))  # type: ignore[untyped-decorator]
def _teacher(  # type: ignore[no-untyped-def]
    logits,  # triton reads annotations itself, and knows no types of ours
    logsumexp,
    totals,
    entropies,
    known,
    vocab,
    stride,
    CAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row's log of summed exponentials, its entropy, and its part of the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.float32)  # sum of exp(x) * x
    for start in range(0, vocab, BLOCK):
        x = _load(base, start + lane, vocab, CAP)
        new_top = tl.maximum(top, x)
        shrink, grow = tl.exp(top - new_top), tl.exp(x - new_top)
        total = total * shrink + grow
        first = first * shrink + grow * tl.maximum(x, _LOWEST)  # 0 * -inf is NaN
        top = new_top
    row_top = tl.max(top, 0)
    scale = tl.exp(top - row_top)
    sum_exp = tl.sum(total * scale, 0)
    lse = row_top + tl.log(sum_exp)
    tl.store(totals + row, lse)
    tl.store(entropies + row, lse - tl.sum(first * scale, 0) / sum_exp)
    if WHOLE:
        tl.store(known + row, 1.0)
    else:  # only rounding can make the part more than the whole
        tl.store(known + row, tl.exp(tl.minimum(lse - tl.load(logsumexp + row), 0.0)))


@triton.jit  # type: ignore[untyped-decorator]
def _totals(  # type: ignore[no-untyped-def]
    base, t_base, t_lse, vocab, OWN_CAP: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """A student row's log of summed exponentials, its mean under the teacher, its best token."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + lane
        x = _load(base, cols, vocab, OWN_CAP)
        p = tl.exp(_load(t_base, cols, vocab, CAP) - t_lse)
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        where = tl.where(x > top, cols, where)
        cross += p * tl.maximum(x, _LOWEST)
        top = new_top
    row_top = tl.max(top, 0)
    lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    token = tl.min(tl.where(top == row_top, where, vocab), 0).to(tl.int64)
    return lse, tl.sum(cross, 0), token


@triton.jit(do_not_specialize_on_alignment=("weights",))  # type: ignore[untyped-decorator]
def _student(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    totals,
    entropies,
    known,
    weights,
    losses,
    overlaps,
    best,
    students,
    vocab,
    stride,
    teacher_stride,
    mix_scale,
    mix_decay,
    OWN_CAP: tl.constexpr,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base, t_base = logits + row * stride, teacher + row // students * teacher_stride
    t_lse = tl.load(totals + row // students)
    part = tl.load(known + row // students)
    weight = tl.load(weights + row).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    # Its reductions are the barrier between its reads of the row and the writes below.
    lse, cross, token = _totals(base, t_base, t_lse, vocab, OWN_CAP, CAP, BLOCK)
    tl.store(best + row, token)
    loss = lse - cross

    overlap = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + lane
        x = _load(base, cols, vocab, OWN_CAP)
        q = tl.exp(x - lse)
        p = tl.exp(_load(t_base, cols, vocab, CAP) - t_lse)
        overlap += tl.minimum(part * p, q)
        if KIND == 0:
            if WANT_GRAD:
                grad = (q - p) * weight
                if OWN_CAP > 0:
                    grad *= 1 - (x / OWN_CAP) * (x / OWN_CAP)
                tl.store(base + cols, grad.to(logits.dtype.element_ty), mask=cols < vocab)
        else:
            below += tl.where(q < part * p, q, 0.0)
    a = tl.sum(overlap, 0)
    tl.store(overlaps + row, a)

    if KIND == 0:
        kl_part = weight
        a_part = 0.0
    elif KIND == 1:
        loss = tl.where(a > 0, -tl.log(a), 0.0)
        kl_part = 0.0
        a_part = tl.where(a > 0, -weight / a, 0.0)
    else:
        mix = mix_scale * tl.exp(-mix_decay * a)
        entropy = tl.load(entropies + row // students)
        loss = mix * (loss - entropy) + (1 - mix) * (1 - a)
        kl_part = mix * weight
        a_part = (mix - 1) * weight
    tl.store(losses + row, loss)

    if KIND != 0 and WANT_GRAD:
        inner = tl.sum(below, 0)
        for start in range(0, vocab, BLOCK):
            cols = start + lane
            x = _load(base, cols, vocab, OWN_CAP)
            q = tl.exp(x - lse)
            p = tl.exp(_load(t_base, cols, vocab, CAP) - t_lse)
            d_overlap = q * (tl.where(q < part * p, 1.0, 0.0) - inner)
            grad = kl_part * (q - p) + a_part * d_overlap
            if OWN_CAP > 0:
                grad *= 1 - (x / OWN_CAP) * (x / OWN_CAP)
            tl.store(base + cols, grad.to(logits.dtype.element_ty), mask=cols < vocab)
