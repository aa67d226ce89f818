"""Losses of a trained output head against a frozen one, without the logits of a batch in memory.

Shapes: U teacher rows, R student rows of each, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..float8 import Lines
from .linear_cross_entropy import HeadProduct
from .soft_loss import SoftLoss, SoftRows, wide

Caps: TypeAlias = "tuple[float | None, float | None]"  # of the student's logits, the teacher's


def linear_soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor,
    loss: SoftLoss | None = None,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_logsumexp: Tensor | None = None,
    chunk: int = 2048,
    float8: Lines | None = None,
) -> tuple[Tensor, SoftRows]:
    """Return the weighted sum of all rows' losses, and what each row came to.

    hidden [U, R, H] goes through the head weight [V, H], teacher_hidden [U, H] through
    teacher_weight [V, H], about `chunk` student rows at a time; each teacher row is computed
    once for its R students.  row_weights [U, R] scale the losses; a row of weight 0 adds
    nothing to any gradient.  Since they are known here, the gradients of hidden and weight
    are made in the forward pass, while the logits are still there, and only scaled in the
    backward.  Softmax, sums over chunks and the losses are float32 (float64 for float64).  A
    softcap c replaces logits x by c * tanh(x / c), the student's or the teacher's.

    teacher_weight may be a part of the teacher's head, the V tokens that the student knows.
    teacher_logsumexp [U] is then over the teacher's whole vocabulary, so that overlaps count
    what the teacher gives to other tokens as lost.  Where it is below the sum of these V, which
    only rounding can make it, that sum is taken: an overlap is at most 1.
    """
    total, losses, overlaps, best = _LinearSoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype),
        weight,
        teacher_hidden.to(teacher_weight.dtype),
        teacher_weight,
        row_weights,
        teacher_logsumexp,
        loss or SoftLoss(),
        (softcap, teacher_softcap),
        chunk,
        float8,
    )
    return total, SoftRows(losses, overlaps, best)


class _LinearSoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        row_weights: Tensor,
        logsumexp: Tensor | None,
        loss: SoftLoss,
        softcaps: Caps,
        chunk: int,
        float8: Lines | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        labels, students = row_weights.shape
        accurate = wide(weight.dtype)
        row_weights = row_weights.to(accurate)
        logsumexp = None if logsumexp is None else logsumexp.to(accurate).contiguous()
        losses = hidden.new_empty(labels, students, dtype=accurate)
        overlaps, best = torch.empty_like(losses), torch.empty_like(losses, dtype=torch.int64)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accurate) if want_weight else None

        step = max(1, min(chunk // max(students, 1), labels))
        vocab = weight.shape[0]
        flat = hidden.flatten(0, 1)
        product = HeadProduct(flat, weight, float8, step * students)
        teacher_logits = teacher_weight.new_empty(step, vocab)
        for start in range(0, labels, step):
            part = slice(start, min(start + step, labels))
            size = part.stop - start
            rows = slice(start * students, part.stop * students)
            d_logits = product.logits(rows)
            teacher = torch.mm(teacher_hidden[part], teacher_weight.t(), out=teacher_logits[:size])
            losses[part], overlaps[part], best[part], d_logits = _rows(
                d_logits,
                teacher,
                row_weights[part],
                None if logsumexp is None else logsumexp[part],
                loss,
                softcaps,
                want_hidden or want_weight,
            )
            d_logits = d_logits.to(weight.dtype)  # float8's are bfloat16
            if grad_hidden is not None:
                torch.mm(d_logits, weight, out=grad_hidden[part].flatten(0, 1))
            if grad_weight is not None:
                _add_product(grad_weight, d_logits.t(), flat[rows])
            del d_logits  # in float8 the next chunk's are others
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, overlaps, best)
        return (losses * row_weights).sum(), losses, overlaps, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * d_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            # scaled and narrowed in one pass over the largest tensor of the backward
            narrow = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, d_total, out=narrow)
        return grad_hidden, grad_weight, *(None,) * 8


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in place, which may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _rows(
    logits: Tensor,
    teacher: Tensor,
    weights: Tensor,
    logsumexp: Tensor | None,
    loss: SoftLoss,
    softcaps: Caps,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return losses, overlaps and best tokens [u, R], and the weighted d(loss)/d(logits)
    [u * R, V]; overwrites `logits` [u * R, V], reads `teacher` [u, V]."""
    if logits.is_cuda:
        from .triton_soft_cross_entropy import soft_cross_entropy_in_place

        return *soft_cross_entropy_in_place(
            logits, teacher, weights, logsumexp, loss, softcaps, want_grad
        ), logits
    accurate, (softcap, teacher_softcap) = weights.dtype, softcaps
    scores = teacher.to(accurate)
    if teacher_softcap is not None:
        scores = torch.tanh(scores / teacher_softcap) * teacher_softcap
    log_p = scores.log_softmax(dim=-1)
    p = log_p.exp()[:, None]  # [u, 1, V]
    drawn = p  # what the teacher draws these tokens with
    if logsumexp is not None:
        known = (scores.logsumexp(dim=-1) - logsumexp).clamp_(max=0).exp_()
        drawn = p * known[:, None, None]
    # In place from here: a chunk of logits is the largest tensor of a CPU run.
    q = logits.to(accurate).view(*weights.shape, -1)
    slope = None
    if softcap is not None:
        q = torch.tanh(q / softcap)
        slope = 1 - q**2 if want_grad else None
        q.mul_(softcap)
    top, best = q.max(dim=-1)
    log_total = (q - top[..., None]).exp_().sum(dim=-1).log_().add_(top)
    losses = log_total - torch.einsum("urv,uv->ur", q, p[:, 0])
    q.sub_(log_total[..., None]).exp_()
    overlaps = torch.minimum(drawn, q).sum(dim=-1)
    if loss.objective == "cross_entropy":
        grad = q.sub_(p) if want_grad else q
    else:
        below = torch.where(q < drawn, q, 0.0)
        d_overlap = below - q * below.sum(dim=-1, keepdim=True)
        if loss.objective == "log_overlap":
            some = overlaps > 0
            losses = torch.where(some, -overlaps.log(), 0.0)
            grad = d_overlap * torch.where(some, -1 / overlaps, 0.0)[..., None]
        else:
            mix = loss.scale * torch.exp(-loss.decay * overlaps)
            entropy = -(p * log_p[:, None]).sum(dim=-1)
            losses = mix * (losses - entropy) + (1 - mix) * (1 - overlaps)
            grad = mix[..., None] * (q - p) - (1 - mix)[..., None] * d_overlap
    if want_grad:
        grad = grad * weights[..., None]
        grad = grad if slope is None else grad * slope
    return losses, overlaps, best, grad.flatten(0, 1).to(logits.dtype)
