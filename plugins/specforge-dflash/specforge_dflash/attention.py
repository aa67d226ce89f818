"""Attention from block slots to the context and to their own block, on two paths.

Keys are the target context, positions 0..S-1, and the block slots themselves.  A slot at
position p = a + k of the block at anchor a sees context j < a, and in its block
  full layers:    every slot;
  sliding layers: slots up to itself (causal), and of all these only the positions
                  within the last W including its own: p - j < W.
The sliding rule is what SGLang serves (W - 1 to the left, causal) and vLLM's default.
Padded blocks see only themselves.

Shapes: b samples, S context, A anchors, B slots of a block, N = A*B, h heads, g of them
for each of the v key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specforge_core.errors import ConfigError

TILE = 128  # rows and columns that flex attention skips or computes together


@dataclass(frozen=True, slots=True)
class EagerMask:
    """What the slots of each block see, as plain masks."""

    context: Tensor  # [b, 1, A, 1, B or 1, S] bool
    own: Tensor  # [B, B] bool

    @classmethod
    def build(
        cls, limits: Tensor, context_length: int, block_size: int, window: int | None
    ) -> EagerMask:
        """`limits` [b, A]: how many context positions a block sees, which is its anchor."""
        slots = torch.arange(block_size, device=limits.device)
        keys = torch.arange(context_length, device=limits.device)
        limit = limits[:, None, :, None, None, None]
        context = keys < limit
        own = torch.ones(block_size, block_size, dtype=torch.bool, device=limits.device)
        if window is not None:
            context = context & (limit + slots[:, None] - keys < window)
            back = slots[:, None] - slots
            own = (back >= 0) & (back < window)
        return cls(context, own)


Mask: TypeAlias = "EagerMask | BlockMask"


def attend(
    q: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor], mask: Mask
) -> Tensor:
    """Return [b, h, N, d] for queries [b, h, N, d], keys and values [b, v, S or N, d]."""
    if isinstance(mask, EagerMask):
        return _eager(q, context_kv, block_kv, mask)
    k = torch.cat([context_kv[0], block_kv[0]], dim=2)
    v = torch.cat([context_kv[1], block_kv[1]], dim=2)
    if not q.is_cuda and torch.is_grad_enabled() and q.requires_grad:
        raise ConfigError(
            "flex attention has no backward pass on a CPU. Try: strategy.attention=auto"
        )
    out: Tensor = _flex(q.is_cuda)(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        # not the one for few queries, which torch would choose below 128 slots: it is compiled
        # apart, and for changing lengths not at all
        kernel_options={"BACKEND": "TRITON"},
    )
    return out


def _eager(
    q: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor], mask: EagerMask
) -> Tensor:
    """One softmax over context and own block, without joining or repeating keys."""
    b, heads, slots, d = q.shape
    kv_heads = context_kv[0].shape[1]
    block = mask.own.shape[0]
    shape = (b, kv_heads, slots // block, heads // kv_heads, block)  # [b, v, A, g, B]
    q = (q * d**-0.5).view(b, kv_heads, shape[3], shape[2], block, d).transpose(2, 3)

    def by_block(x: Tensor) -> Tensor:  # [b, v, N, d] -> [b, v, A, B, d]
        return x.view(b, kv_heads, shape[2], block, d)

    context = q.reshape(b, kv_heads, -1, d) @ context_kv[0].transpose(-1, -2)
    own = q.reshape(b, kv_heads, shape[2], -1, d) @ by_block(block_kv[0]).transpose(-1, -2)
    context = context.view(*shape, -1).float().masked_fill(~mask.context, float("-inf"))
    own = own.view(*shape, block).float().masked_fill(~mask.own, float("-inf"))
    top = own.amax(-1, keepdim=True)
    if context.shape[-1]:
        top = torch.maximum(top, context.amax(-1, keepdim=True))
    top = top.detach()  # the softmax does not depend on it
    context, own = (context - top).exp(), (own - top).exp()
    total = context.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)

    out = context.to(q.dtype).view(b, kv_heads, -1, context.shape[-1]) @ context_kv[1]
    inner = own.to(q.dtype).view(b, kv_heads, shape[2], -1, block) @ by_block(block_kv[1])
    out = (out.view(*shape, d).float() + inner.view(*shape, d)) / total
    return out.to(q.dtype).transpose(2, 3).reshape(b, heads, slots, d)


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _flex(fused: bool) -> Callable[..., Any]:
    """Flex attention, compiled unless something around it is being compiled already."""
    if torch.compiler.is_compiling() or not fused:
        return flex_attention
    return _compiled_flex()


def block_mask(
    limits: Tensor, context_length: int, block_size: int, window: int | None
) -> BlockMask:
    """Return flex attention's mask over keys [context | slots], from the anchors alone.

    Which tiles are empty, partly or wholly visible follows from each query tile's lowest
    and highest anchor; nothing of size N x N is made.
    """
    count = limits.shape[1]
    queries, keys = count * block_size, context_length + count * block_size

    def visible(batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        limit = limits[batch, q // block_size]
        inner = kv - context_length
        same = (inner >= 0) & (inner // block_size == q // block_size)
        if window is None:
            return (kv < limit) | same
        off = q % block_size
        back = off - inner % block_size
        near = (kv < limit) & (limit + off - kv < window)
        return near | (same & (back >= 0) & (back < window))

    partly, wholly = _tiles(limits, context_length, block_size, window)
    return BlockMask.from_kv_blocks(
        *_ordered(partly & ~wholly),
        *_ordered(wholly),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _tiles(
    limits: Tensor, context_length: int, block_size: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return [b, 1, query tiles, key tiles] bool: partly visible, and wholly visible."""
    device = limits.device
    queries = limits.shape[1] * block_size
    q0 = torch.arange(0, queries, TILE, device=device)[:, None]
    q1 = (q0 + TILE).clamp(max=queries)
    k0 = torch.arange(0, context_length + queries, TILE, device=device)
    k1 = k0 + TILE

    slot_limits = limits.repeat_interleave(block_size, dim=1)
    missing = -queries % TILE
    slot_limits = torch.cat([slot_limits, slot_limits[:, -1:].expand(-1, missing)], dim=1)
    tiles = slot_limits.view(len(limits), -1, TILE)
    low, high = tiles.amin(-1)[:, :, None], tiles.amax(-1)[:, :, None]  # [b, query tiles, 1]

    partly, wholly = k0 < high, k1 <= low
    if window is not None:
        partly = partly & (low - (k1 - 1) < window)
        wholly = wholly & (high + block_size - 1 - k0 < window)
    own_begin = context_length + q0 // block_size * block_size
    own_end = context_length + (q1 + block_size - 1) // block_size * block_size
    partly = partly | ((k0 < own_end) & (k1 > own_begin))
    return partly[:, None], wholly[:, None]


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of each row are set, and their columns first."""
    columns = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).int(), columns.int()
