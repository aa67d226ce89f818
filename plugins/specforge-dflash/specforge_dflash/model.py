"""The DFlash draft: layers over block slots that read the target's states in every layer.

Parameter names are those of the published checkpoints.  Shapes: b rows, S context
tokens, A blocks, B slots of a block, N = A*B, H hidden size, K captured layers, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.float8 import Lines, by_rows, fits, in_float8, linears
from specforge_core.nn.cache import GrowingCache
from specforge_core.nn.rotary import Rope, Rotary, rotate
from specforge_core.target.head import widen
from specforge_core.target.measure import HeadScale
from specforge_core.types import Draft

from .anchored import AnchoredMask, takes
from .attention import MIN_HEAD_DIM, NO_END, EagerMask, Mask, attend, block_mask
from .config import DraftShape, LayerType

Build: TypeAlias = Callable[[Tensor, Tensor, int, int, int | None], Mask]
Model = TypeVar("Model", bound=nn.Module)


class Geometry:
    """Positions and visibility, shared by all layers.

    No dataclass: FSDP's mixed precision would cast the tensors in one, and RoPE needs float32.
    """

    def __init__(
        self, context_rope: Rope, block_rope: Rope, masks: Mapping[LayerType, Mask]
    ) -> None:
        self.context_rope = context_rope
        self.block_rope = block_rope
        self.masks = masks


class BlockAttention(nn.Module):
    """Queries from the slots; keys and values from context and slots by one projection."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        geometry: Geometry,
        mask: Mask,
        cache: GrowingCache | None,
    ) -> Tensor:
        """Return [b, N, H] for normed slots [b, N, H] and context [b, S, H]."""
        q, k, v = linears(hidden, self.q_proj, self.k_proj, self.v_proj)
        q = rotate(self.q_norm(self._heads(q)), geometry.block_rope)
        block_kv = self._keys_values(k, v, geometry.block_rope)
        k, v = linears(context, self.k_proj, self.v_proj)
        context_kv = self._keys_values(k, v, geometry.context_rope)
        if cache is not None:
            context_kv = cache.extend(*context_kv)
        out = attend(q, context_kv, block_kv, mask)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _keys_values(self, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return rotate(self.k_norm(self._heads(k)), rope), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        heads = x.shape[-1] // self.head_dim
        return x.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class BlockLayer(nn.Module):
    """One pre-norm layer; the context goes to attention as it is."""

    def __init__(self, shape: DraftShape, index: int) -> None:
        super().__init__()
        self.layer_type = shape.layer_types[index]
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = BlockAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, hidden: Tensor, context: Tensor, geometry: Geometry, cache: GrowingCache | None
    ) -> Tensor:
        """Return [b, N, H] for slots [b, N, H]."""
        mask = geometry.masks[self.layer_type]
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden), context, geometry, mask, cache
        )
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class DFlashModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, shape: DraftShape, attention: Literal["auto", "flex", "eager"]) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.rotary = Rotary(shape.rope, shape.head_dim, shape.max_positions)
        width = shape.hidden_size
        self.fc = nn.Linear(len(shape.capture_layers) * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps=shape.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(shape, i) for i in range(shape.num_layers))
        self.norm = nn.RMSNorm(width, eps=shape.rms_norm_eps)

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        anchors: Tensor,
        starts: Tensor,
        positions: Tensor,
        caches: Sequence[GrowingCache] | None = None,
    ) -> Tensor:
        """Return the slots' final states [b, N, H], normed.

        features [b, S, K*H] are the target's captured states, positions [b, S] where in their
        documents; embeddings [b, N, H] the slots' inputs; anchors and starts [b, A] where in the
        row each block and its document start, anchors ascending.  With caches, one per layer,
        `features` and `positions` are those of the tokens since the last call, and all before
        are context too.
        """
        hidden = embeddings.to(self.fc.weight.dtype)
        if torch.is_grad_enabled():
            # no view, and with a gradient as all later layers' input has one: else the first
            # layer is compiled apart
            hidden.requires_grad_()
        geometry = self._geometry(anchors, starts, positions, caches)
        # last before the layers: it keeps a GPU busy while the host enters the first of them
        context = self.context(features)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, context, geometry, None if caches is None else caches[i])
        out: Tensor = self.norm(hidden)
        return out

    def context(self, features: Tensor) -> Tensor:
        """Return what the layers read of captured states: [..., H] for [..., K*H]."""
        out: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return out

    def _geometry(
        self,
        anchors: Tensor,
        starts: Tensor,
        positions: Tensor,
        caches: Sequence[GrowingCache] | None,
    ) -> Geometry:
        block = self.shape.block_size
        length = positions.shape[1] + (0 if caches is None else caches[0].length)
        within = torch.arange(block, device=anchors.device)
        slots = ((anchors - starts)[..., None] + within).flatten(1)
        build = EagerMask.build if caches is not None else self._mask_kind(anchors.is_cuda)
        windows: dict[LayerType, int | None] = {
            "full_attention": NO_END if self.shape.causal else None,
            "sliding_attention": self.shape.sliding_window,
        }
        return Geometry(
            self.rotary(positions),
            self.rotary(slots),
            {
                kind: build(anchors, starts, length, block, windows[kind])
                for kind in dict.fromkeys(self.shape.layer_types)  # once each
            },
        )

    def _mask_kind(self, on_gpu: bool) -> Build:
        """Return what makes the mask of the path that training takes."""
        if self.attention == "auto" and on_gpu:
            if takes(self.shape.head_dim, self.shape.block_size, self.fc.weight.dtype):
                return AnchoredMask.build
            return block_mask if self.shape.head_dim >= MIN_HEAD_DIM else EagerMask.build
        return block_mask if self.attention == "flex" else EagerMask.build


def backbone_of(model: nn.Module) -> DFlashModel:
    """Return a DFlash draft's model, or the backbone of that of a method around it."""
    backbone = model if isinstance(model, DFlashModel) else model.get_submodule("backbone")
    assert isinstance(backbone, DFlashModel)
    return backbone


class Frozen(nn.Module):
    """The target's embedding [V, H] and head: read, never trained, never saved.

    `lm_head` is [V, H], or with a bias wider, as `Head.joined` makes it.  A scale of the target's
    logits is left out: the draft's own norm takes its place.  What the target does to its own
    logits is `beside`, which only a teacher needs.
    """

    def __init__(
        self,
        embed_tokens: Tensor,
        lm_head: Tensor,
        scale: float,
        softcap: float | None,
        beside: HeadScale | None = None,
    ) -> None:
        super().__init__()
        tied = lm_head is embed_tokens
        self.embed_tokens = nn.Parameter(embed_tokens, requires_grad=False)
        self.lm_head = (
            self.embed_tokens if tied else nn.Parameter(lm_head, requires_grad=False)
        )  # one parameter stays one when moved or cast
        self.scale = scale
        self.softcap = softcap
        self.beside = beside or HeadScale(scale=1.0, softcap=softcap)
        self._float8: Lines | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Return the target's embeddings of `ids`, scaled as it scales them."""
        out = F.embedding(ids, self.embed_tokens)
        return out if self.scale == 1.0 else out * self.scale

    @property
    def has_bias(self) -> bool:
        return self.lm_head.shape[1] != self.embed_tokens.shape[1]

    def states(self, hidden: Tensor) -> Tensor:
        """Return states [..., H] as `lm_head` multiplies them."""
        return widen(hidden, self.lm_head.shape[1])

    def float8_head(self, model: nn.Module) -> Lines | None:
        """Return the head in float8, made once, if a model is and the head's sizes allow it."""
        if not (in_float8(model) and fits(self.lm_head)):
            return None
        if self._float8 is None:
            self._float8 = by_rows(self.lm_head)
        return self._float8

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits over the target's vocabulary."""
        out = F.linear(self.states(hidden).to(self.lm_head.dtype), self.lm_head).float()
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def own_logits(self, products: Tensor) -> Tensor:
        """Return the target's logits for products of its head and final states."""
        out, cap = products * self.beside.scale, self.beside.softcap
        return out if cap is None else cap * torch.tanh(out / cap)


def parts(draft: Draft, model: type[Model]) -> tuple[Model, Frozen]:
    """Return a draft's model, which is of the type `model`, and what it reads of the target."""
    assert isinstance(draft.model, model)
    assert isinstance(draft.frozen, Frozen)
    return draft.model, draft.frozen
