"""Attention from block slots to the context and to their own block, on three paths.

Keys are the target context, places 0..S-1 of a row, and the block slots themselves.  A slot at
place p = a + k of the block at anchor a, in a document that starts at s, sees context
s <= j < a, and in its block
  full layers:    every slot;
  sliding layers: slots up to itself (causal), and of all these only the places
                  within the last W including its own: p - j < W;
  causal layers:  slots up to itself: a window that no text is longer than, `NO_END`.
The sliding rule is what SGLang serves (W - 1 to the left, causal) and vLLM's default.
A block whose anchor is its document's start sees only itself.

Shapes: b rows, S context, A anchors, B slots of a block, N = A*B, h heads, g of them
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

from .anchored import AnchoredMask, anchored

NO_END = 2**30  # the window of layers that are causal and do not slide
TILE = 128  # rows and columns that flex attention skips or computes together
MIN_HEAD_DIM = 16  # of its kernels


@dataclass(frozen=True, slots=True)
class Part:
    """Some blocks that follow each other, and the stretch of the context that they see."""

    blocks: int
    begin: int  # of the stretch
    seen: Tensor  # [b, 1, blocks, 1, B or 1, its length] bool


@dataclass(frozen=True, slots=True)
class EagerMask:
    """What the slots of each block see, as plain masks."""

    parts: tuple[Part, ...]  # of all blocks, in order
    own: Tensor  # [B, B] bool

    @classmethod
    def build(
        cls,
        limits: Tensor,
        starts: Tensor,
        context_length: int,
        block_size: int,
        window: int | None,
    ) -> EagerMask:
        """Blocks [b, A] see the context from `starts` to before `limits`, their anchors.

        On a CPU a packed row is taken apart by documents, else its cost would be quadratic in
        them.  A GPU is never waited for, so there it is one part.
        """
        slots = torch.arange(block_size, device=limits.device)
        own = torch.ones(block_size, block_size, dtype=torch.bool, device=limits.device)
        if window is not None:
            back = slots[:, None] - slots
            own = (back >= 0) & (back < window)
        stretches = [(limits.shape[1], 0, context_length)]
        if limits.device.type == "cpu" and len(limits) == 1:
            stretches = _stretches(limits[0], starts[0])
        parts, first = [], 0
        for count, begin, end in stretches:
            keys = torch.arange(begin, end, device=limits.device)
            limit, start = (
                x[:, None, first : first + count, None, None, None] for x in (limits, starts)
            )
            seen = (keys >= start) & (keys < limit)
            if window is not None and window < context_length + block_size:
                seen = seen & (limit + slots[:, None] - keys < window)
            parts.append(Part(count, begin, seen))
            first += count
        return cls(tuple(parts), own)


def _stretches(limits: Tensor, starts: Tensor) -> list[tuple[int, int, int]]:
    """Return each document's number of blocks, and the context they see; limits, starts [A]."""
    begins, counts = torch.unique_consecutive(starts, return_counts=True)
    ends = [int(part.max()) for part in torch.split(limits, counts.tolist())]
    return list(zip(counts.tolist(), begins.tolist(), ends, strict=True))


Mask: TypeAlias = "EagerMask | BlockMask | AnchoredMask"


def attend(
    q: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor], mask: Mask
) -> Tensor:
    """Return [b, h, N, d] for queries [b, h, N, d], keys and values [b, v, S or N, d]."""
    if isinstance(mask, EagerMask):
        return _eager(q, context_kv, block_kv, mask)
    if isinstance(mask, AnchoredMask):
        return anchored(q, context_kv, block_kv, mask)
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

    def by_block(x: Tensor) -> Tensor:  # [b, v, N, d] -> [b, v, A, B, d]
        return x.view(b, kv_heads, slots // block, block, d)

    q = (q * d**-0.5).view(b, kv_heads, heads // kv_heads, slots // block, block, d)
    q = q.transpose(2, 3)  # [b, v, A, g, B, d]
    keys, values = (by_block(x) for x in block_kv)
    done, first = [], 0
    for part in mask.parts:
        here, there = slice(first, first + part.blocks), slice(part.begin, _end(part))
        own_kv = keys[:, :, here], values[:, :, here]
        seen_kv = context_kv[0][:, :, there], context_kv[1][:, :, there]
        done.append(_eager_part(q[:, :, here], seen_kv, own_kv, part.seen, mask.own))
        first += part.blocks
    out = done[0] if len(done) == 1 else torch.cat(done, dim=2)
    return out.to(q.dtype).transpose(2, 3).reshape(b, heads, slots, d)


def _end(part: Part) -> int:
    return part.begin + part.seen.shape[-1]


def _eager_part(
    q: Tensor,
    context_kv: tuple[Tensor, Tensor],
    block_kv: tuple[Tensor, Tensor],
    seen: Tensor,
    own_seen: Tensor,
) -> Tensor:
    """Return [b, v, A, g, B, d] for queries of this shape, context and blocks [b, v, A, B, d]."""
    shape = q.shape
    context = q.flatten(2, 4) @ context_kv[0].transpose(-1, -2)
    own = q.flatten(3, 4) @ block_kv[0].transpose(-1, -2)
    context = context.view(*shape[:-1], seen.shape[-1]).float().masked_fill(~seen, float("-inf"))
    own = own.view(*shape[:-1], shape[4]).float().masked_fill(~own_seen, float("-inf"))
    top = own.amax(-1, keepdim=True)
    if context.shape[-1]:
        top = torch.maximum(top, context.amax(-1, keepdim=True))
    top = top.detach()  # the softmax does not depend on it
    context, own = (context - top).exp(), (own - top).exp()
    total = context.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)

    out = context.to(q.dtype).flatten(2, 4) @ context_kv[1]
    inner = own.to(q.dtype).flatten(3, 4) @ block_kv[1]
    return (out.view(shape).float() + inner.view(shape)) / total


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _flex(fused: bool) -> Callable[..., Any]:
    """Flex attention, compiled unless something around it is being compiled already."""
    if torch.compiler.is_compiling() or not fused:
        return flex_attention
    return _compiled_flex()


def block_mask(
    limits: Tensor, starts: Tensor, context_length: int, block_size: int, window: int | None
) -> BlockMask:
    """Return flex attention's mask over keys [context | slots], from each block's bounds [b, A].

    Which tiles are empty, partly or wholly visible follows from the bounds of each query tile's
    blocks; nothing of size N x N is made, and the device is not waited for.
    """
    count = limits.shape[1]
    queries, keys = count * block_size, context_length + count * block_size

    def visible(batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = q // block_size
        limit = limits[batch, block]
        inner = kv - context_length
        same = (inner >= 0) & (inner // block_size == block)
        near = (kv < limit) & (kv >= starts[batch, block])
        if window is None:
            return near | same
        off = q % block_size
        back = off - inner % block_size
        near = near & (limit + off - kv < window)
        return near | (same & (back >= 0) & (back < window))

    tiles = _tiles(limits, starts, context_length, block_size, window)
    return tiled_mask(visible, *tiles, queries, keys)


def tiled_mask(
    visible: Callable[..., Tensor], partly: Tensor, wholly: Tensor, queries: int, keys: int
) -> BlockMask:
    """Return flex attention's mask of what is `visible` of (batch, head, query, key).

    `partly` and `wholly` [b, 1, query tiles, key tiles] bool say where any of it, and all is.
    """
    return BlockMask.from_kv_blocks(
        *_ordered(partly & ~wholly),
        *_ordered(wholly),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _tiles(
    limits: Tensor, starts: Tensor, context_length: int, block_size: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return [b, 1, query tiles, key tiles] bool: partly visible, and wholly visible."""
    device = limits.device
    queries = limits.shape[1] * block_size
    q0 = torch.arange(0, queries, TILE, device=device)[:, None]
    q1 = (q0 + TILE).clamp(max=queries)
    k0 = torch.arange(0, context_length + queries, TILE, device=device)
    k1 = k0 + TILE

    # of every query tile the blocks it has slots of; the last of them again where it has fewer
    most = (TILE - 1) // block_size + 2
    blocks = q0 // block_size + torch.arange(most, device=device)
    blocks = torch.minimum(blocks, (q1 - 1) // block_size)  # [query tiles, most]
    limit, start = limits[:, blocks, None], starts[:, blocks, None]  # [b, query tiles, most, 1]
    low = start
    partly, wholly = k0 < limit, (k0 >= start) & (k1 <= limit)
    if window is not None:
        low = torch.maximum(start, limit + 1 - window)  # the first that its first slot sees
        wholly = wholly & (limit + block_size - 1 - k0 < window)
    partly = (partly & (k1 > low) & (low < limit)).any(2)
    wholly = wholly.all(2)
    own_begin = context_length + q0 // block_size * block_size
    own_end = context_length + (q1 + block_size - 1) // block_size * block_size
    partly = partly | ((k0 < own_end) & (k1 > own_begin))
    return partly[:, None], wholly[:, None]


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of each row are set, and their columns first."""
    columns = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).int(), columns.int()
