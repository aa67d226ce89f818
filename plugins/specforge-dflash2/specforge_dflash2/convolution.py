"""Grouped dynamic convolutions around both halves of a DFlash layer.

Shapes: b rows, B slots of a block, N slots of a row (a multiple of B), H hidden size, K taps,
G groups of H/G channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_dflash.model import BlockLayer, DFlashModel, Geometry
from torch import Tensor, nn

from specforge_core.nn.cache import GrowingCache


class GroupedConv(nn.Module):
    """Mixes each slot with those before it in its block, on both sides of a sublayer.

    Channel c of slot t becomes the sum over taps o of
        (base_kernel[side, o, c] + delta[t, side, o, group of c]) * x[t - o, c]
    where x is 0 before the block's first slot.  The deltas of both sides are one projection of
    the sublayer's input.  As made, it changes nothing.
    """

    def __init__(self, hidden_size: int, block_size: int, taps: int, group_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.group_size = group_size
        groups = hidden_size // group_size
        base = torch.zeros(2, taps, hidden_size)
        base[:, 0] = 1
        self.base_kernel = nn.Parameter(base)
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * groups, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the sublayer gets for its normed input [b, N, H], and `after`'s deltas."""
        taps = self.base_kernel.shape[1]
        deltas = self.kernel_projection(x).view(*x.shape[:2], 2, taps, -1)
        return self._convolve(x, deltas[:, :, 0], 0), deltas[:, :, 1]

    def after(self, x: Tensor, deltas: Tensor) -> Tensor:
        """Return the sublayer's output [b, N, H] convolved with deltas [b, N, K, G]."""
        return self._convolve(x, deltas, 1)

    def _convolve(self, x: Tensor, deltas: Tensor, side: int) -> Tensor:
        taps, size = self.base_kernel.shape[1], self.group_size
        base = self.base_kernel[side].view(taps, -1, size)
        # both [b, A, B, ...]: of each block's slots the kernels [K, G, H/G], and the values
        kernel = (base + deltas[..., None]).view(x.shape[0], -1, self.block_size, *base.shape)
        blocks = x.view(x.shape[0], -1, self.block_size, base.shape[1], size)
        out = kernel[:, :, :, 0] * blocks
        for tap in range(1, taps):
            back = F.pad(blocks[:, :, :-tap], (0, 0, 0, 0, tap, 0))
            out = out + kernel[:, :, :, tap] * back
        return out.view(x.shape)


class ConvLayer(nn.Module):
    """A DFlash layer, whose parts it takes over, with convolutions around attention and MLP."""

    def __init__(self, layer: BlockLayer, attention_conv: GroupedConv, mlp_conv: GroupedConv):
        super().__init__()
        self.layer_type = layer.layer_type
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.attention_conv = attention_conv
        self.mlp_conv = mlp_conv

    def forward(
        self, hidden: Tensor, context: Tensor, geometry: Geometry, cache: GrowingCache | None
    ) -> Tensor:
        """Return [b, N, H] for slots [b, N, H] and context [b, S, H], which is not convolved."""
        x, deltas = self.attention_conv.before(self.input_layernorm(hidden))
        x = self.self_attn(x, context, geometry, geometry.masks[self.layer_type], cache)
        hidden = hidden + self.attention_conv.after(x, deltas)
        x, deltas = self.mlp_conv.before(self.post_attention_layernorm(hidden))
        out: Tensor = hidden + self.mlp_conv.after(self.mlp(x), deltas)
        return out


def convolve(backbone: DFlashModel, taps: int, group_size: int) -> None:
    """Put convolutions, which change nothing as made, into the layers of a backbone."""
    shape = backbone.shape

    def conv() -> GroupedConv:
        return GroupedConv(shape.hidden_size, shape.block_size, taps, group_size)

    layers = [layer for layer in backbone.layers if isinstance(layer, BlockLayer)]
    backbone.layers = nn.ModuleList(ConvLayer(layer, conv(), conv()) for layer in layers)
