"""Rotary position embedding for drafts: the target's frequencies, over the whole head.

Shapes: n positions, b samples (none, or the first axis), d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError

Rope: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, [(b,) n, d / 2] float32

# Kinds that make one frequency table of a whole head, the same at every length.
STATIC = ("default", "linear", "llama3", "yarn")
KEYS = (
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
)


def draft_rope(target: Mapping[str, Any], theta: float | None = None) -> dict[str, Any]:
    """Return a draft's rope parameters: the target config's, or plain ones of `theta`.

    A draft's rope is one table at every length, which all engines serve alike.  Where the
    target's is not (it changes with the length, or leaves some of a head alone), the draft's is
    plain RoPE of the target's theta: it is trained with it, and owes the target's nothing.
    partial_rotary_factor is left out, since engines rotate a draft's whole head, and so
    are the sections of multimodal RoPE, which is plain RoPE on text.
    """
    if theta is not None:
        return {"rope_type": "default", "rope_theta": theta}
    given = rope_of(target)
    beside = {"original_max_position_embeddings": target.get("original_max_position_embeddings")}
    rope = {key: value for key in KEYS if (value := given.get(key, beside.get(key))) is not None}
    rope.setdefault("rope_type", given.get("type", "default"))
    if rope["rope_type"] == "default" or rope["rope_type"] not in STATIC:
        rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta")}
    rope["rope_theta"] = float(rope.get("rope_theta") or target.get("rope_theta") or 10000.0)
    return rope


def stored_rope(draft: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope parameters of a draft that exists, from its config.

    A target's rope may be replaced, a draft's may not: ConfigError for one that is not one table.
    """
    rope, given = draft_rope(draft), rope_of(draft)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("mrope", rope["rope_type"]):
        raise ConfigError(
            f"the export has rope_type {kind!r}, which is not one table at every length. "
            "Use another checkpoint"
        )
    return rope


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config says of its rotary embedding, in either spelling."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole = given.get("full_attention")  # one set per layer type
    return whole if isinstance(whole, Mapping) else given


class Rotary:
    """A frequency table.  No module: it must not follow the weights' dtype."""

    def __init__(self, rope: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters=dict(rope),
        )
        with torch.device("cpu"):
            table = LlamaRotaryEmbedding(config)
        self._frequencies: Tensor = table.inv_freq.float()  # [d / 2]
        self._scale = float(table.attention_scaling)

    def __call__(self, positions: Tensor) -> Rope:
        """Return cosines and sines for positions [n] or [b, n]."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions[..., None].float() * self._frequencies
        return angles.cos() * self._scale, angles.sin() * self._scale


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate [n, heads, d] or [b, heads, n, d] in float32 (or float64), halves paired.

    The halves are not joined by `cat`: a compiled backward pass would not make that again, and
    keep queries and keys twice, before and after.
    """
    cos, sin = (part[:, None, ..., None, :] for part in rope)
    wide = torch.promote_types(x.dtype, torch.float32)
    halves = x.to(wide).view(*x.shape[:-1], 2, x.shape[-1] // 2)
    first = (torch.arange(2, device=x.device) == 0)[:, None]
    partner = torch.where(first, -halves[..., 1:, :], halves[..., :1, :])
    turned: Tensor = halves * cos + partner * sin
    return turned.flatten(-2).to(x.dtype)
