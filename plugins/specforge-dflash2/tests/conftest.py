"""A tiny draft around random target tensors, and the method written out plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specforge_dflash2 import extend
from specforge_dflash2.config import DFlash2Config
from torch import Tensor

from specforge_core.types import Batch, Sample, StepContext, TargetInfo

from ... import dflash_kit as dflash
from ...dflash_kit import Tiny

OPTIONS: dict[str, Any] = {
    "name": "dflash2",
    "num_layers": 2,
    "block_size": 4,
    "mask_token_id": 40,
    "conv_group_size": 6,
    "selector_rank": 5,
    "selector_top_k": 6,
}


def make_target(**overrides: Any) -> TargetInfo:
    return dflash.make_target(41, **overrides)


def make_tiny(softcap: float | None = None, *, fresh: bool = False, **options: Any) -> Tiny:
    """A draft whose weights are not its first ones, unless `fresh`."""
    config = DFlash2Config.model_validate({**OPTIONS, **options})

    def vary(name: str) -> float:
        if fresh:
            return 0.0
        if "selector" in name:
            return 1.0  # enough to change what is drafted
        return 0.3 if "conv" in name or "norm" in name else 0.0

    return dflash.make_tiny(config, lambda plain: extend(config, plain), vary, softcap=softcap)


def make_samples(lengths: tuple[int, ...] = (19, 11), seed: int = 2) -> list[Sample]:
    return dflash.make_samples(lengths, seed)


def make_batch(config: DFlash2Config, samples: list[Sample]) -> Batch:
    return dflash.make_batch(config, samples)


# ---- the method, one block, one slot, one channel at a time ----------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rope(x: Tensor, positions: Tensor, theta: float = 1000.0) -> Tensor:
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    low, high = x[:, :half], x[:, half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def convolve(x: Tensor, base: Tensor, deltas: Tensor, group: int) -> Tensor:
    """x [B, H], base [K, H], deltas [B, K * groups]: the sum over taps, slot by slot."""
    taps, width = base.shape
    rows = []
    for t in range(len(x)):
        row = torch.zeros(width, dtype=x.dtype)
        for tap in range(min(taps, t + 1)):
            own = deltas[t, tap * (width // group) : (tap + 1) * (width // group)]
            row = row + (base[tap] + own.repeat_interleave(group)) * x[t - tap]
        rows.append(row)
    return torch.stack(rows)


def wrapped(
    p: dict[str, Tensor], name: str, group: int, x: Tensor, sublayer: Callable[[Tensor], Tensor]
) -> Tensor:
    base, projection = p[f"{name}.base_kernel"], p[f"{name}.kernel_projection.weight"]
    first, second = (x @ projection.t()).chunk(2, dim=-1)
    return convolve(sublayer(convolve(x, base[0], first, group)), base[1], second, group)


def attention(
    p: dict[str, Tensor], tiny: Tiny, h: Tensor, context: Tensor, positions: Tensor, window: Any
) -> Tensor:
    shape = tiny.model.backbone.shape
    d, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    own, both, heads = positions[len(context) :], torch.cat([context, h]), []
    for head in range(shape.num_heads):
        q_rows = slice(head * d, head * d + d)
        kv_rows = slice(head // group * d, head // group * d + d)
        q = norm(h @ p["self_attn.q_proj.weight"][q_rows].t(), p["self_attn.q_norm.weight"])
        k = norm(both @ p["self_attn.k_proj.weight"][kv_rows].t(), p["self_attn.k_norm.weight"])
        v = both @ p["self_attn.v_proj.weight"][kv_rows].t()
        scores = rope(q, own) @ rope(k, positions).t() / math.sqrt(d)
        if window is not None:
            back = own[:, None] - positions
            scores = scores.masked_fill((back < 0) | (back >= window), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ p["self_attn.o_proj.weight"].t()


def block_states(
    weights: dict[str, Tensor], tiny: Tiny, features: Tensor, token: int, anchor: int
) -> Tensor:
    """Final states [B, H] in float64 of the block that starts with `token` at `anchor`."""
    shape, group = tiny.model.backbone.shape, tiny.config.conv_group_size
    ids = torch.full((shape.block_size,), 40)
    ids[0] = token
    x = tiny.frozen.embed_tokens.double()[ids]
    context = norm(
        features.double()[:anchor] @ weights["fc.weight"].t(), weights["hidden_norm.weight"]
    )
    positions = torch.arange(anchor + shape.block_size)
    for i in range(shape.num_layers):
        p = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items()}
        window = shape.sliding_window

        def attend(h: Tensor, p: dict[str, Tensor] = p, window: Any = window) -> Tensor:
            return attention(p, tiny, h, context, positions, window)

        def mlp(h: Tensor, p: dict[str, Tensor] = p) -> Tensor:
            gate = torch.nn.functional.silu(h @ p["mlp.gate_proj.weight"].t())
            return (gate * (h @ p["mlp.up_proj.weight"].t())) @ p["mlp.down_proj.weight"].t()

        h = norm(x, p["input_layernorm.weight"])
        x = x + wrapped(p, "attention_conv", group, h, attend)
        h = norm(x, p["post_attention_layernorm.weight"])
        x = x + wrapped(p, "mlp_conv", group, h, mlp)
    return norm(x, weights["norm.weight"])


def logits_of(tiny: Tiny, state: Tensor) -> Tensor:
    logits = tiny.config.output_multiplier * (tiny.frozen.lm_head.double() @ state)
    return dflash.capped(logits, tiny.frozen.softcap)


def edges(weights: dict[str, Tensor], state: Tensor, before: int, tokens: list[int]) -> Tensor:
    """What the selector adds to the logits of `tokens` behind `before`."""
    name = "candidate_selector."
    wanted = weights[name + "hidden_projection.weight"] @ state
    left = weights[name + "predecessor_codebook"][before]
    return weights[name + "successor_codebook"][tokens] @ (left * wanted)


def weights64(tiny: Tiny) -> dict[str, Tensor]:
    """All parameters under their published names."""
    return {
        k.removeprefix("backbone."): v.detach().double().requires_grad_()
        for k, v in tiny.model.named_parameters()
    }


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    target: Callable[..., TargetInfo] = make_target
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = dflash.make_context
    states64: Callable[..., Tensor] = block_states
    logits64: Callable[..., Tensor] = logits_of
    edges64: Callable[..., Tensor] = edges
    weights64: Callable[[Tiny], dict[str, Tensor]] = weights64


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
