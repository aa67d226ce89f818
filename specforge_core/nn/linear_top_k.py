"""The most likely tokens of a frozen output head, without the logits of a batch in memory.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .soft_loss import wide


def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    also: Tensor | None = None,
    softcap: float | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return each row's k best tokens [N, k] int64, best first, and their logits [N, k].

    hidden [N, H] goes through the head weight [V, H] in the weight's dtype, `chunk` rows at a
    time; logits are float32 (float64 for float64).  `softcap` c replaces logits x by
    c * tanh(x / c).  The logits have a gradient to hidden, made of the k tokens' rows of the
    head alone.  With `also` [N], one token of each row, both are [N, k + 1]: it comes last, whether
    or not it is among the k.

    Raises ValueError when the weight wants a gradient, which this does not make, and when k is
    not from 1 to V.
    """
    if weight.requires_grad:
        raise ValueError("linear_top_k takes a frozen head: weight.requires_grad is set")
    if not 0 < k <= len(weight):
        raise ValueError(f"linear_top_k: k is {k}, and the head has {len(weight)} tokens")
    ids, logits = _LinearTopK.apply(hidden.to(weight.dtype), weight, k, max(1, chunk), also)  # type: ignore[no-untyped-call]
    return ids, logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, k: int, chunk: int, also: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, columns = len(hidden), k if also is None else k + 1
        ids = torch.empty(rows, columns, dtype=torch.int64, device=hidden.device)
        best = torch.empty(rows, columns, dtype=wide(weight.dtype), device=hidden.device)
        if also is not None:
            ids[:, k] = also
        logits = weight.new_empty(min(chunk, rows), len(weight))
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            own = torch.mm(hidden[part], weight.t(), out=logits[: part.stop - start])
            best[part, :k], ids[part, :k] = own.topk(k, dim=1)
            best[part, k:] = own.gather(1, ids[part, k:])
        ctx.save_for_backward(weight, ids)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(ids)
        return ids, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _d_ids: Tensor, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        weight, ids = ctx.saved_tensors
        grad = weight.new_empty(len(ids), weight.shape[1])
        rows = max(1, ctx.chunk // ids.shape[1])  # k rows of the head for each are in memory
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            chosen = F.embedding(ids[part], weight)  # [n, k, H]
            grad[part] = torch.einsum("nk,nkh->nh", d_logits[part].to(weight.dtype), chosen)
        return grad, None, None, None, None
