"""Cross-entropy of logits and of corrected logits, without those of a whole batch in memory.

Shapes: N rows, W width of the head's rows, r rank of the correction, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specforge_core.nn.linear_cross_entropy import cross_entropy_rows


class Scored(NamedTuple):
    """The loss, and what each row is worth, without gradients: bare logits, then corrected."""

    loss_sum: Tensor  # scalar float32, with a gradient
    losses: Tensor  # [2, N] float32
    best: Tensor  # [2, N] int64


def corrected_cross_entropy(
    hidden: Tensor,
    codes: Tensor,
    head: Tensor,
    proj: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    base_share: float,
    softcap: float | None = None,
    chunk: int = 1024,
) -> Scored:
    """Return sum_n weights_n ((1 - base_share) CE(final_n) + base_share CE(base_n)).

    base = hidden @ head.T, final = base + codes @ proj.T, for hidden [N, W], codes [N, r], the
    frozen head [V, W] and the trained proj [V, r], all computed in the head's dtype, `chunk` rows
    at a time; softmaxes are float32.  `softcap` c replaces logits x, the final ones after the sum,
    by c * tanh(x / c).  As the rows' weights are known, all gradients are made in the forward
    pass while the logits are there, and only scaled in the backward.
    """
    given = [hidden, codes, head, proj]
    if not torch.is_grad_enabled():
        given = [x.detach() for x in given]  # else gradients of a trained proj would be made
    found = _Corrected.apply(  # type: ignore[no-untyped-call]
        *(x.to(head.dtype) for x in given), labels, weights, (base_share, softcap, chunk)
    )
    return Scored(*found)


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, codes: Tensor, head: Tensor, proj: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        labels, weights, (base_share, softcap, chunk) = rest
        want = any(ctx.needs_input_grad[:4])
        losses, best = weights.new_empty(2, len(labels)), labels.new_empty(2, len(labels))
        d_hidden, d_codes = torch.empty_like(hidden), torch.empty_like(codes)
        d_proj = proj.new_zeros(proj.shape if want else (0,), dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            base = hidden[part] @ head.t()
            slopes = []
            for kind, logits in enumerate((base, torch.addmm(base, codes[part], proj.t()))):
                losses[kind, part], best[kind, part], slope = cross_entropy_rows(
                    logits, labels[part], softcap, want
                )
                slopes.append(slope)
            if want:
                d_base, d_final = slopes
                d_final *= (weights[part] * (1 - base_share)).to(d_final.dtype)[:, None]
                d_base *= (weights[part] * base_share).to(d_base.dtype)[:, None]
                d_base += d_final
                torch.mm(d_base, head, out=d_hidden[part])
                torch.mm(d_final, proj, out=d_codes[part])
                d_proj += (d_final.t() @ codes[part]).float()
        if want:
            ctx.save_for_backward(d_hidden, d_codes, d_proj.to(proj.dtype))
        ctx.mark_non_differentiable(losses, best)
        total = (weights * torch.lerp(losses[1], losses[0], base_share)).sum()
        return total, losses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, codes, proj = ((d_total * g).to(g.dtype) for g in ctx.saved_tensors)
        return hidden, codes, None, proj, None, None, None
