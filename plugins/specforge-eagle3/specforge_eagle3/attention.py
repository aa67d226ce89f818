"""Attention of training-time test: step-0 keys, causal, and a row's own keys of later steps.

At step i, row t sees the keys of step 0 of the rows up to t in its document, and its own
keys of steps 1 to i.  Two paths: `eager` scores everything at once, on any device and dtype (on
a CPU in one document after the other); flash, on a GPU, runs one causal attention per step and
merges the own terms by log-sum-exp, so that nothing of size N x N is made and memory grows
linearly with the steps.

The backward of the flash path needs no more than the causal kernel's own: given the merged
output and the merged log-sum-exp, it makes the gradients of just its part of the softmax.

Shapes: N tokens, h heads, v key/value heads of g = h / v heads each, d head size, i own terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rows import Documents

KeyValue = tuple[Tensor, Tensor]  # [N, v, d] each


def attend(
    q: Tensor, first: KeyValue, own: Sequence[KeyValue], docs: Documents, path: str
) -> Tensor:
    """Return [N, h, d] for queries [N, h, d], step-0 keys and values, and those of steps 1..i."""
    keys, values = [k for k, _ in own], [v for _, v in own]
    if path == "auto" and _has_flash(q):
        out: Tensor = _Flash.apply(docs, q, *first, *keys, *values)  # type: ignore[no-untyped-call]
        return out
    stacked = (torch.stack(keys), torch.stack(values)) if own else None
    return eager(q, first, stacked, docs.visible) if q.is_cuda else _each(q, first, stacked, docs)


def _each(q: Tensor, first: KeyValue, own: KeyValue | None, docs: Documents) -> Tensor:
    """Attend in one document after the other: on a CPU their bounds are there to read."""
    lengths = docs.bounds.diff().tolist()
    queries, *firsts = (torch.split(x, lengths) for x in (q, *first))
    owns: list[KeyValue | None] = [None] * len(lengths)
    if own is not None:
        owns = list(zip(*(torch.split(x, lengths, dim=1) for x in own), strict=True))
    parts = []
    for query, key, value, mine in zip(queries, *firsts, owns, strict=True):
        visible = torch.ones(len(query), len(query), dtype=torch.bool).tril_()
        parts.append(eager(query, (key, value), mine, visible))
    return torch.cat(parts)


def _has_flash(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def eager(
    q: Tensor,
    first: KeyValue,
    own: KeyValue | None,
    visible: Tensor | None,
    own_visible: Tensor | None = None,
) -> Tensor:
    """Return [N, h, d] for queries [N, h, d], keys and values [M, v, d], and own ones [i, N, v, d].

    `visible` [N, M] says which of the M a query sees, `own_visible` [N, i] which of its own; None
    is all of them.
    """
    n, heads, d = q.shape
    kv_heads = first[0].shape[1]
    grouped = (q * d**-0.5).view(n, kv_heads, heads // kv_heads, d)
    by_head = grouped.permute(1, 2, 0, 3)  # [v, g, N, d]
    v, g = by_head.shape[:2]
    keys, values = (x.transpose(0, 1) for x in first)  # [v, M, d]
    scores = (by_head.reshape(v, g * n, d) @ keys.transpose(1, 2)).view(v, g, n, keys.shape[1])
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if own is not None:
        mine = torch.einsum("nvgd,invd->vgni", grouped, own[0])
        if own_visible is not None:
            mine = mine.masked_fill(~own_visible, float("-inf"))
        scores = torch.cat([scores, mine], dim=-1)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(q.dtype)
    split = keys.shape[1]
    mixed = (weights[..., :split].reshape(v, g * n, split) @ values).view(v, g, n, d)
    if own is not None:
        mixed = mixed + torch.einsum("vgni,invd->vgnd", weights[..., split:], own[1])
    out: Tensor = mixed.permute(2, 0, 1, 3).flatten(1, 2)
    return out


class _Flash(torch.autograd.Function):
    """On a GPU.  The causal attention also returns its log-sum-exp [h, N]."""

    @staticmethod
    def forward(ctx: Any, docs: Documents, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scale, size = q.shape[-1] ** -0.5, (docs.bounds, docs.bounds, docs.longest, docs.longest)
        out: Tensor
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *size, 0.0, True, False, scale=scale
        )
        lse = lse.view(q.shape[1], -1)
        steps = len(own) // 2
        if steps:
            from .triton_own import merge

            out, lse = merge(q, out, lse, torch.stack(own[:steps]), torch.stack(own[steps:]))
        ctx.save_for_backward(q, k, v, out, lse, *state, *own)
        ctx.size, ctx.num_state = size, len(state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        state, own = rest[: ctx.num_state], rest[ctx.num_state :]
        d_out = d_out.contiguous()
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *ctx.size, 0.0, True, *state, scale=q.shape[-1] ** -0.5
        )
        steps = len(own) // 2
        if not steps:
            return None, d_q, d_k, d_v
        from .triton_own import merge_backward

        keys, values = torch.stack(own[:steps]), torch.stack(own[steps:])
        d_q, d_keys, d_values = merge_backward(d_q, d_out, q, out, lse, keys, values)
        return None, d_q, d_k, d_v, *d_keys.unbind(), *d_values.unbind()
