"""Attention of anchored blocks by kernels of its own: an operator that torch.compile can hold.

Shapes: b rows, S context, A blocks of B slots, N = A*B, h heads, v key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specforge_core.compiled import opaque

MAX_BLOCK = 64  # slots: a program holds whole blocks
KEYS = 64  # context keys that have one entry in `ranges`


class AnchoredMask:
    """Which stretch of the context each slot sees, and which slots see some context keys.

    No dataclass: FSDP's mixed precision would look into one.
    """

    def __init__(
        self, low: Tensor, high: Tensor, ranges: Tensor, block_size: int, window: int | None
    ) -> None:
        self.low = low  # [b, N] int32, the first key
        self.high = high  # [b, N] int32, the last and one; `low` where there is none
        # [b, S / KEYS rounded up, 2] int32: from which to before which slot any of KEYS is seen
        self.ranges = ranges
        self.block_size = block_size
        self.window = window or 0

    @classmethod
    def build(
        cls,
        limits: Tensor,
        starts: Tensor,
        context_length: int,
        block_size: int,
        window: int | None,
    ) -> AnchoredMask:
        """Blocks [b, A] see the context from `starts` to before `limits`, their anchors.

        The device is not waited for.  Where anchors ascend, what sees a key is no more than
        the range says; else only time is lost.
        """
        low, high = starts[..., None], limits[..., None]
        slots = torch.arange(block_size, device=limits.device)
        low = low.expand(-1, -1, block_size)
        if window is not None:
            low = torch.maximum(low, high + slots + 1 - window)
        low = torch.minimum(low, high)
        keys = torch.arange(0, context_length, KEYS, device=limits.device)[:, None]
        some = (limits[:, None] > keys) & (low[:, None, :, 0] < keys + KEYS)
        some = some & (low[:, None, :, 0] < limits[:, None])  # [b, tiles, A]
        number = torch.arange(limits.shape[1], device=limits.device)
        begin = torch.where(some, number, limits.shape[1]).amin(-1)
        end = torch.where(some, number + 1, 0).amax(-1)
        return cls(
            low.flatten(1).int(),
            high.expand_as(low).flatten(1).int(),
            (torch.stack([begin, end], -1) * block_size).int(),
            block_size,
            window,
        )


def takes(head_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    """Say whether the kernels take such heads and blocks; larger ones do not fit on the chip."""
    largest = 256 if dtype in (torch.bfloat16, torch.float16) else 128
    known = largest == 256 or dtype == torch.float32
    return known and 16 <= head_dim <= largest and block_size <= MAX_BLOCK


def anchored(
    q: Tensor,
    context_kv: tuple[Tensor, Tensor],
    block_kv: tuple[Tensor, Tensor],
    mask: AnchoredMask,
) -> Tensor:
    """Return [b, h, N, d] for queries [b, h, N, d], keys and values [b, v, S or N, d]."""
    out: Tensor
    out, _ = _attention(
        q, *context_kv, *block_kv, mask.low, mask.high, mask.ranges, mask.block_size, mask.window
    )
    return out


def _forward(
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    block_k: Tensor,
    block_v: Tensor,
    low: Tensor,
    high: Tensor,
    ranges: Tensor,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp [b, h, N] in base 2."""
    from .launch import forward

    with _device(q):
        return forward(q, (context_k, context_v), (block_k, block_v), (low, high), block, window)


def _backward(
    d_out: Tensor,
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    block_k: Tensor,
    block_v: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    ranges: Tensor,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .launch import backward

    with _device(q):
        return backward(
            d_out,
            q,
            (context_k, context_v),
            (block_k, block_v),
            (out, lse),
            (low, high),
            ranges,
            block,
            window,
        )


def _device(q: Tensor) -> Any:
    """Make q's device the current one, which kernels are started on."""
    return torch.cuda.device(q.device if q.is_cuda else -1)


def by_token(like: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return an empty [b, heads, n, d] whose heads are side by side in memory."""
    b, _, n, d = like.shape
    return torch.empty(b, n, heads, d, dtype=dtype, device=like.device).transpose(1, 2)


def _fake(q: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return by_token(q, q.shape[1], q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(d_out: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_token(x, x.shape[1], x.dtype) for x in read[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output, *inputs[5:8])
    ctx.sizes = inputs[8:]


def _differentiate(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(d_out, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None, None, None, None


_NAME = "specforge_dflash::anchored_attention"
_READ = "Tensor q, Tensor context_k, Tensor context_v, Tensor block_k, Tensor block_v"
_SEEN = "Tensor low, Tensor high, Tensor ranges, int block, int window"
_attention = opaque(f"{_NAME}({_READ}, {_SEEN}) -> (Tensor, Tensor)", _forward, _fake)
_attention_backward = opaque(
    f"{_NAME}_backward(Tensor d_out, {_READ}, Tensor out, Tensor lse, {_SEEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
torch.library.register_autograd(_NAME, _differentiate, setup_context=_keep)
