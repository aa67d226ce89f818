"""Cross-entropy of a frozen output head, without the logits of a whole batch in memory.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..float8 import Lines, by_rows, multiply


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    chunk: int = 1024,
    float8: Lines | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each row's cross-entropy [N] float32 and its best token [N] int64.

    hidden [N, H] goes through the head weight [V, H] in the weight's dtype, `chunk`
    rows at a time; the softmax is float32.  `softcap` c replaces logits x by
    c * tanh(x / c).  Since the head is frozen, the gradient of each row's loss to its
    hidden state is made in the forward pass, while the row's logits are still there,
    and only scaled in the backward: the logits are neither kept nor computed again.
    `float8` is the weight by rows, if logits are to be a product in float8: in bfloat16 then.
    Their gradient's product is not in float8, which GPUs add up with 14 bits: over a vocabulary
    they lose per cents of the softmax's terms, all of one sign, and nothing of the label's.

    Raises ValueError when the weight wants a gradient: a trained head needs the
    product of logit gradients and hidden states too, which this does not make.
    """
    if weight.requires_grad:
        raise ValueError("linear_cross_entropy takes a frozen head: weight.requires_grad is set")
    losses, best = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, labels, softcap, max(1, chunk), float8
    )
    return losses, best


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float | None,
        chunk: int,
        float8: Lines | None,
    ) -> tuple[Tensor, Tensor]:
        want_grad = ctx.needs_input_grad[0]
        rows = hidden.shape[0]
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        best = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if want_grad else None
        product = HeadProduct(hidden, weight, float8, chunk)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            losses[part], best[part], d_logits = cross_entropy_rows(
                product.logits(part), labels[part], softcap, want_grad
            )
            if grad is not None:
                torch.mm(d_logits.to(weight.dtype), weight, out=grad[part])
            del d_logits  # in float8 the next chunk's are others
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        ctx.mark_non_differentiable(best)
        return losses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor, _d_best: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * d_losses[:, None]).to(grad.dtype), *(None,) * 5


class HeadProduct:
    """Logits of rows of `hidden` [N, H] by a head's weight [V, H], `chunk` rows at most at once.

    Without float8, they overwrite those of the chunk before.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, float8: Lines | None, chunk: int) -> None:
        self.hidden, self.weight, self.float8 = hidden, weight, float8
        if float8 is None:
            self._logits = weight.new_empty(min(chunk, len(hidden)), len(weight))
        else:
            self._narrow = by_rows(hidden)

    def logits(self, part: slice) -> Tensor:
        """Return the logits [n, V] of rows `part`."""
        if self.float8 is None:
            out = self._logits[: part.stop - part.start]
            return torch.mm(self.hidden[part], self.weight.t(), out=out)
        values, scales = self._narrow
        scales = scales[part].clone()  # aligned, wherever the part begins
        return multiply(Lines(values[part], scales), self.float8)


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, softcap: float | None, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [n], best tokens [n] and d(loss)/d(logits) [n, V]; overwrites `logits`.

    One softmax of a chunk of logits, for methods whose logits are no single product.  Without
    `want_grad` the third is meaningless.
    """
    if logits.is_cuda:
        from .triton_cross_entropy import cross_entropy_in_place

        losses, best = cross_entropy_in_place(logits, labels, softcap, want_grad)
        return losses, best, logits
    # In place from here: a chunk of logits is the largest tensor of a CPU run.
    scores = logits.float()
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (scores / softcap) ** 2 if softcap is not None and want_grad else None
    top, best = scores.max(dim=1)
    own = scores.gather(1, labels[:, None]).squeeze(1)
    exps = scores.sub_(top[:, None]).exp_()
    total = exps.sum(dim=1)
    losses = top + total.log() - own
    if want_grad:
        exps.div_(total[:, None])
        exps[torch.arange(len(labels), device=labels.device), labels] -= 1
        if slope is not None:
            exps.mul_(slope)
    return losses, best, exps.to(logits.dtype)
