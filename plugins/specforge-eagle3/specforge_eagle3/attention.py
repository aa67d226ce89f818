"""Attention of training-time test: step-0 keys, causal, and a row's own keys of later steps.

At step i, row t sees the keys of step 0 of the rows up to t in its document, and its own
keys of steps 1 to i.  Two paths: `eager` scores everything at once, on any device and dtype;
`flash` runs one causal attention per step and merges the own terms by log-sum-exp, so that
nothing of size N x N is made and memory grows linearly with the steps.

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
    if path == "eager" or (path == "auto" and not _has_flash(q)):
        return _eager(q, first, own, docs)
    keys, values = [k for k, _ in own], [v for _, v in own]
    out: Tensor = _Flash.apply(docs, q, *first, *keys, *values)  # type: ignore[no-untyped-call]
    return out


def _has_flash(q: Tensor) -> bool:
    return not q.is_cuda or (q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256)


def _eager(q: Tensor, first: KeyValue, own: Sequence[KeyValue], docs: Documents) -> Tensor:
    n, _, d = q.shape
    q = (q * d**-0.5).view(n, first[0].shape[1], -1, d)
    scores = torch.einsum("nvgd,mvd->nvgm", q, first[0])
    scores = scores.masked_fill(~docs.visible[:, None, None], float("-inf"))
    if not own:
        weights = scores.softmax(-1, dtype=_wide(q)).to(q.dtype)
        return torch.einsum("nvgm,mvd->nvgd", weights, first[1]).flatten(1, 2)
    keys, values = (torch.stack([kv[part] for kv in own]) for part in (0, 1))
    scores = torch.cat([scores, torch.einsum("nvgd,invd->nvgi", q, keys)], dim=-1)
    weights = scores.softmax(-1, dtype=_wide(q)).to(q.dtype)
    out = torch.einsum("nvgm,mvd->nvgd", weights[..., :n], first[1])
    out = out + torch.einsum("nvgi,invd->nvgd", weights[..., n:], values)
    return out.flatten(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, docs: Documents, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, state = _causal(q, k, v, docs)
        steps = len(own) // 2
        if steps:
            out, lse = _merge(q, out, lse, torch.stack(own[:steps]), torch.stack(own[steps:]))
        ctx.save_for_backward(q, k, v, out, lse, *state, *own)
        ctx.docs, ctx.num_state = docs, len(state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        state, own = rest[: ctx.num_state], rest[ctx.num_state :]
        d_out = d_out.contiguous()
        d_q, d_k, d_v = _causal_backward(d_out, q, k, v, out, lse, state, ctx.docs)
        steps = len(own) // 2
        if not steps:
            return None, d_q, d_k, d_v
        keys, values = torch.stack(own[:steps]), torch.stack(own[steps:])
        d_q, d_keys, d_values = _merge_backward(d_q, d_out, q, out, lse, keys, values)
        return None, d_q, d_k, d_v, *d_keys.unbind(), *d_values.unbind()


# ---- one causal attention, which also returns its log-sum-exp [h, N] ---------


def _causal(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents
) -> tuple[Tensor, Tensor, list[Tensor]]:
    scale = q.shape[-1] ** -0.5
    if q.is_cuda:
        bounds, longest = docs.bounds, docs.longest
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )
        return out, lse.view(q.shape[1], -1), state
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], len(q), dtype=_wide(q))
    for part, (q_, k_, v_) in _by_document(docs, q, k, v):
        got, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_, k_, v_, 0.0, True, scale=scale
        )
        out[part] = got[0].transpose(0, 1)
        lse[:, part] = sums.view(q.shape[1], -1)
    return out, lse, []


def _causal_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: list[Tensor],
    docs: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    if q.is_cuda:
        size = (docs.bounds, docs.bounds, docs.longest, docs.longest)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *size, 0.0, True, *state, scale=scale
        )
        return grads
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part, (q_, k_, v_) in _by_document(docs, q, k, v):
        d_out_, out_ = (x[part].transpose(0, 1)[None] for x in (d_out, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out_, q_, k_, v_, out_, lse[None, :, part].contiguous(), 0.0, True, scale=scale
        )
        d_q[part] = found[0][0].transpose(0, 1)
        for into, repeated in ((d_k, found[1]), (d_v, found[2])):
            by_head = repeated[0].view(k.shape[1], -1, *repeated.shape[2:])
            into[part] = by_head.sum(1).transpose(0, 1)
    return d_q, d_k, d_v


def _by_document(docs: Documents, *tensors: Tensor) -> Any:
    """Yield each document's place and its [1, h, T, d] of every tensor, key heads repeated."""
    heads, start = tensors[0].shape[1], 0
    for length in docs.lengths:
        part = slice(start, start + length)
        parts = [x[part].transpose(0, 1)[None] for x in tensors]
        yield part, [x.repeat_interleave(heads // x.shape[1], dim=1) for x in parts]
        start += length


# ---- the own terms, keys and values [i, N, v, d] ------------------------------


def _merge(
    q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp with the own terms added."""
    if q.is_cuda:
        from .triton_own import merge

        return merge(q, out, lse, keys, values)
    scores = _own_scores(q, keys)
    first = lse.t().view(scores.shape[1:])
    total = torch.logaddexp(first, scores.logsumexp(0))
    out_ = out.view(*total.shape, -1) * (first - total).exp()[..., None]
    own = torch.einsum("invg,invd->nvgd", (scores - total).exp(), values.to(total.dtype))
    return (out_ + own).flatten(1, 2).to(q.dtype), total.flatten(1).t().contiguous()


def _merge_backward(
    d_q: Tensor,
    d_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_q with the own terms' part added, and the gradients of keys and values."""
    if q.is_cuda:
        from .triton_own import merge_backward

        return merge_backward(d_q, d_out, q, out, lse, keys, values)
    wide, scale = lse.dtype, q.shape[-1] ** -0.5
    scores = _own_scores(q, keys)  # [i, N, v, g]
    weights = (scores - lse.t().view(scores.shape[1:])).exp()
    shape = (*scores.shape[1:], -1)
    d_out_, out_, q_ = (x.to(wide).view(shape) for x in (d_out, out, q))
    drop = (d_out_ * out_).sum(-1)
    d_scores = weights * (torch.einsum("nvgd,invd->invg", d_out_, values.to(wide)) - drop) * scale
    d_keys = torch.einsum("invg,nvgd->invd", d_scores, q_).to(keys.dtype)
    d_values = torch.einsum("invg,nvgd->invd", weights, d_out_).to(values.dtype)
    added = torch.einsum("invg,invd->nvgd", d_scores, keys.to(wide))
    return (d_q + added.flatten(1, 2)).to(q.dtype), d_keys, d_values


def _own_scores(q: Tensor, keys: Tensor) -> Tensor:
    wide = _wide(q)
    grouped = q.to(wide).view(len(q), keys.shape[2], -1, q.shape[-1])
    return torch.einsum("nvgd,invd->invg", grouped, keys.to(wide) * q.shape[-1] ** -0.5)
