"""Scores which candidates of neighbouring slots follow each other.

Parameter names are those of the published checkpoints, behind `lilicorr.`.  Shapes: L lattices,
D slots of each, K candidates of a slot, N = D*K, H the draft's width, h the lattice's, f the length
of the vectors.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.nn.decoder import init_weights
from specforge_core.nn.soft_loss import wide

from .config import LiLiCorrConfig

FEATURES = 5
HEADS_STD = 0.02  # of the vectors' heads: zeros on both sides would stay zeros


class Vectors(NamedTuple):
    """Unit vectors, float32 or wider: a candidate's score is a product of two, times a scale."""

    anchors: Tensor  # [L, f], of the known token before slot 0
    outs: Tensor  # [L, D, K, f], of a candidate before the next slot's
    ins: Tensor  # [L, D, K, f], of a candidate behind the slot before


def lattice_mlp(into: int, between: int, out: int) -> nn.Sequential:
    """Return two layers with biases."""
    up, down = nn.Linear(into, between), nn.Linear(between, out)
    return nn.Sequential(OrderedDict(up_proj=up, act=nn.SiLU(), down_proj=down))


class LatticeLayer(nn.Module):
    """One pre-norm layer; all candidates see all."""

    def __init__(self, config: LiLiCorrConfig, width: int, eps: float) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(width, eps=eps)
        # for its parameters: by itself it would want the scores' bias once for each lattice
        self.attn = nn.MultiheadAttention(width, config.lattice_heads)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.mlp = lattice_mlp(width, int(width * config.lattice_mlp_ratio), width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return [L, N, h] for [L, N, h] and what is added to the scores [heads, N, N]."""
        attn = self.attn
        qkv = F.linear(self.attn_norm(x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Lattice(nn.Module):
    """A small transformer over the candidates of all slots of a block."""

    def __init__(self, config: LiLiCorrConfig, hidden_size: int, eps: float, std: float) -> None:
        super().__init__()
        width, slots = config.lattice_hidden_size or hidden_size, config.num_draft_tokens
        self.eps = config.vector_eps
        self.token_proj = None if width == hidden_size else nn.Linear(hidden_size, width)
        self.pass_hidden_proj = nn.Linear(hidden_size, width)
        self.feature_norm = nn.LayerNorm(FEATURES)
        self.feature_mlp = lattice_mlp(FEATURES, width, width)
        self.slot_embedding = nn.Parameter(torch.zeros(1, 1, slots, 1, width))
        self.rank_embedding = nn.Parameter(torch.zeros(1, 1, 1, config.candidate_top_k, width))
        self.relative_slot_bias = nn.Parameter(torch.zeros(config.lattice_heads, 2 * slots + 1))
        self.same_slot_bias = nn.Parameter(torch.zeros(config.lattice_heads))
        self.context_proj = nn.Linear(hidden_size, width)
        self.layers = nn.ModuleList(
            LatticeLayer(config, width, eps) for _ in range(config.lattice_layers)
        )
        self.output_norm = nn.RMSNorm(width, eps=eps)
        self.anchor_norm = nn.RMSNorm(width, eps=eps)
        self.factor_input_proj = nn.Linear(3 * width, width)
        self.out_head = nn.Linear(width, config.factor_dim)
        self.in_head = nn.Linear(width, config.factor_dim)
        self.anchor_out_head = nn.Linear(width, config.factor_dim)
        init_weights(self, std, config.seed)
        for head in (self.out_head, self.in_head, self.anchor_out_head):
            head.weight.data *= HEADS_STD / std
        draw = torch.Generator().manual_seed(config.seed)
        for name, parameter in self.named_parameters():
            if name.endswith("in_proj_weight"):
                nn.init.normal_(parameter, std=std, generator=draw)

    def forward(
        self, tokens: Tensor, log_probs: Tensor, states: Tensor, context: Tensor, anchored: Tensor
    ) -> Vectors:
        """Return the vectors of all candidates.

        tokens [L, D, K, H] are the target's embeddings of the candidates, best first, log_probs
        [L, D, K] float32 theirs under the draft, over its whole vocabulary; states [L, D, H] the
        slots' final ones; context [L, H] what the draft reads of the token before the anchor, and
        anchored [L] bool where there is one.
        """
        dtype = self.slot_embedding.dtype
        x = tokens.to(dtype) if self.token_proj is None else self.token_proj(tokens.to(dtype))
        x = x + self.pass_hidden_proj(states.to(dtype))[:, :, None]
        x = x + self.feature_mlp(self.feature_norm(features(log_probs).to(dtype)))
        x = (x + self.slot_embedding[0] + self.rank_embedding[0]).flatten(1, 2)
        bias = self._bias(log_probs.shape[1], log_probs.shape[2])
        for layer in self.layers:
            x = layer(x, bias)
        x = self.output_norm(x).unflatten(1, log_probs.shape[1:])
        # zero behind the projection, which has a bias
        anchor = self.context_proj(context.to(dtype)) * anchored[:, None].to(dtype)
        anchor = self.anchor_norm(anchor)
        factors = F.silu(self._joined(x, anchor[:, None, None]))
        return Vectors(
            self._unit(self.anchor_out_head(anchor)),
            self._unit(self.out_head(factors)),
            self._unit(self.in_head(factors)),
        )

    def _joined(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Return factor_input_proj([x, anchor, x * anchor]), never put side by side."""
        own, known, both = torch.split(self.factor_input_proj.weight, x.shape[-1], dim=1)
        out = F.linear(x, own, self.factor_input_proj.bias) + F.linear(anchor, known)
        return out + F.linear(x * anchor, both)

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x.to(wide(x.dtype)), dim=-1, eps=self.eps)

    def _bias(self, slots: int, candidates: int) -> Tensor:
        """Return what attention adds to its scores [heads, N, N], by the distance of the slots."""
        place = torch.arange(slots, device=self.same_slot_bias.device)
        distance = place[:, None] - place
        bias = self.relative_slot_bias[:, distance + self.relative_slot_bias.shape[1] // 2]
        bias = bias + self.same_slot_bias[:, None, None] * (distance == 0).to(bias.dtype)
        return bias.repeat_interleave(candidates, 1).repeat_interleave(candidates, 2)


def features(log_probs: Tensor) -> Tensor:
    """Return [..., K, 5] of candidates' log_probs [..., K], best first.

    Log-probability, probability, distance to the best's, rank from 0 to 1, if it is the best.
    """
    rank = torch.arange(log_probs.shape[-1], device=log_probs.device, dtype=log_probs.dtype)
    parts = (
        log_probs,
        log_probs.exp(),
        log_probs - log_probs[..., :1],
        (rank / (len(rank) - 1)).expand_as(log_probs),
        (rank == 0).to(rank.dtype).expand_as(log_probs),
    )
    return torch.stack(parts, dim=-1)


def scores(before: Tensor, ins: Tensor, scale: float) -> Tensor:
    """Return scores [..., K] of candidates `ins` [..., K, f] behind vectors `before` [..., f]."""
    return scale * torch.matmul(ins, before[..., None]).squeeze(-1)
