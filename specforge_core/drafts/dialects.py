"""The spellings serving engines and transformers versions have for the same facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def layer_inputs(layers: Iterable[int]) -> list[int]:
    """Translate our layer ids for an engine that counts inputs: output of i = input of i + 1."""
    return [layer + 1 for layer in layers]


def from_layer_inputs(ids: Iterable[int]) -> list[int]:
    """Translate "input of layer i" ids to ours; the inverse of `layer_inputs`."""
    return [number - 1 for number in ids]


def rope_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return a draft's rotary parameters in both spellings, for its config.json.

    The new one is `rope_parameters`, with `rope_type` and `rope_theta` in it, the old one
    `rope_theta` and `rope_scaling`; an engine reads one or the other.
    """
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "rope_parameters": dict(rope),
    }
