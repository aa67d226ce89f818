"""The shape of a draft's decoder layers: the target's, unless options say otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch import nn

from ..config import StrategyConfig
from ..drafts.dialects import rope_fields
from ..draws import draws_of
from ..errors import ConfigError
from ..types import TargetInfo
from .rotary import draft_rope

MOST_THREADS = 16  # that draw weights: beside each other, memory is what they wait for


class DecoderOptions(StrategyConfig):
    """Base of a `strategy:` section whose draft has decoder layers."""

    num_heads: int | None = Field(None, gt=0, le=10**4, description="As the target's if not set.")
    num_kv_heads: int | None = Field(
        None, gt=0, le=10**4, description="As the target's if not set."
    )
    head_dim: int | None = Field(
        None, gt=0, le=10**5, multiple_of=2, description="As the target's."
    )
    intermediate_size: int | None = Field(
        None, gt=0, le=10**6, description="As the target's if not set."
    )
    rope_theta: float | None = Field(
        None, ge=1, le=1e12, description="Plain RoPE, not the target's."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What every decoder layer of a draft needs to know, resolved against one target."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_positions: int
    rope: Mapping[str, Any]
    vocab_size: int
    softcap: float | None  # of the target's logits
    init_std: float


def decoder_fields(options: DecoderOptions, target: TargetInfo) -> dict[str, Any]:
    """Return the fields of a DecoderShape.  Raises ConfigError when they do not fit the target."""
    found, hidden = target.config, target.hidden_size
    heads = options.num_heads or _largest(found.get("num_attention_heads")) or _heads(hidden)
    kv_heads = options.num_kv_heads or _largest(found.get("num_key_value_heads")) or heads
    size = options.head_dim or _largest(found.get("head_dim")) or hidden // heads
    if size % 2:
        raise ConfigError(
            f"heads of size {size} cannot be rotated. Try: strategy.num_heads, a divisor of half "
            f"the target's hidden size {hidden}"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} attention heads cannot share {kv_heads} key/value heads. "
            "Try: strategy.num_kv_heads, a divisor of strategy.num_heads"
        )
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "intermediate_size": options.intermediate_size
        or _largest(found.get("intermediate_size"))
        or 4 * hidden,
        "rms_norm_eps": float(found.get("rms_norm_eps") or 1e-6),
        "max_positions": int(found.get("max_position_embeddings") or 32768),
        "rope": draft_rope(found, options.rope_theta),
        "vocab_size": target.vocab_size,
        "softcap": found.get("final_logit_softcapping") or found.get("logits_soft_cap"),
        "init_std": float(found.get("initializer_range") or 0.02),
    }


def _largest(value: Any) -> int | None:
    """Return a size of a config, which may be one per layer; None where it is not said."""
    sizes = value if isinstance(value, list | tuple) else [value]
    return max((int(size) for size in sizes if size), default=None)


def _heads(hidden_size: int) -> int:
    """Return how many heads a draft has where the target has none: of 128, or as near as fits."""
    size = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if hidden_size % size == 0)
    return hidden_size // size


def decoder_config(shape: DecoderShape) -> dict[str, Any]:
    """Return what config.json says of such layers; rotary embeddings in both spellings."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": shape.init_std,
        "max_position_embeddings": shape.max_positions,
        **rope_fields(shape.rope),
        "tie_word_embeddings": False,  # else an engine takes the embedding for the head
        "vocab_size": shape.vocab_size,
    }


def init_weights(model: nn.Module, std: float, seed: int, *, but: nn.Module | None = None) -> None:
    """Fill linear layers (normal, `std`; biases 0) and norms (ones) from `seed` alone.

    So they are alike on all ranks.  `but` is a layer that is left as it is.
    A layer's draws depend on `seed` and on its name in `model`, and on nothing else: so layers are
    drawn beside each other, where one thread would take 14 s for a draft of 1 G parameters.
    """

    def fill(named: tuple[str, nn.Linear]) -> None:
        name, layer = named
        nn.init.normal_(layer.weight, std=std, generator=draws_of(seed, name))
        if layer.bias is not None:  # else as torch drew it, by the global seed
            nn.init.zeros_(layer.bias)

    every = ((name, m) for name, m in model.named_modules() if m is not but)
    layers = [(name, m) for name, m in every if isinstance(m, nn.Linear)]
    layers.sort(key=lambda named: -named[1].weight.numel())  # a large one begun last ends alone
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, layers))
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
