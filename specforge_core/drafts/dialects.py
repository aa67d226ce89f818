"""The spellings serving engines and transformers versions have for the same facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PluginError

PARTIAL = "partial_rotary_factor"  # beside rope_scaling in the old spelling, inside in the new
ORIGINAL = "original_max_position_embeddings"


def layer_inputs(layers: Iterable[int]) -> list[int]:
    """Translate our layer ids for an engine that counts inputs: output of i = input of i + 1."""
    return [layer + 1 for layer in layers]


def from_layer_inputs(ids: Iterable[int]) -> list[int]:
    """Translate "input of layer i" ids to ours; the inverse of `layer_inputs`."""
    return [number - 1 for number in ids]


def rope_fields(
    config: Mapping[str, Any],
    *,
    layer_type: str = "full_attention",
    drop: Iterable[str] = (),
) -> dict[str, Any]:
    """Return a config's rotary embedding in both spellings, for a draft's config.json.

    The new one is `rope_parameters`, the old one `rope_theta` and `rope_scaling`;
    an engine reads one or the other.  Where the config has rotary embeddings per
    layer type, those of `layer_type` are taken.  `drop` names parameters that the
    draft does not share with the target: a draft that rotates whole heads must not
    inherit `partial_rotary_factor`.
    """
    rope = _parameters(config, layer_type)
    for name in drop:
        rope.pop(name, None)
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", PARTIAL)}
    fields = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "rope_parameters": rope,
    }
    if PARTIAL in rope:
        fields[PARTIAL] = rope[PARTIAL]
    return fields


def _parameters(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """Return a config's rotary parameters, flat and complete, in the new spelling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        if layer_type not in found:
            raise PluginError(
                f"the target has rotary embeddings for layers of type {', '.join(sorted(found))}, "
                f"not {layer_type!r}. Name one of them"
            )
        found = found[layer_type]
    rope = dict(found)
    kind = rope.pop("type", None)  # the oldest spelling of rope_type
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if config.get(PARTIAL) is not None:
        rope.setdefault(PARTIAL, config[PARTIAL])
    if rope["rope_type"] != "default" and config.get(ORIGINAL) is not None:
        rope.setdefault(ORIGINAL, config[ORIGINAL])
    return rope
