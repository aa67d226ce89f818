"""What a published checkpoint says that no tensor shows, and this package would not compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from specforge_dflash.export import load_export

from specforge_core.errors import CheckpointError

OURS = ("label_layout", "sample_from_anchor")
SLIDING = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}


def load(kit: Any, tiny: Any, top: dict[str, Any], nested: dict[str, Any]) -> bool:
    """Read `tiny`'s export, its layout as other trainers write it but for what is given."""
    made = kit.export(tiny)
    left_out = (*top, "layer_types")
    config = {k: v for k, v in made.config.items() if k not in left_out} | top
    plain = {k: v for k, v in made.config["dflash_config"].items() if k not in OURS}
    config["dflash_config"] = plain | nested
    found: bool = load_export(tiny.config, tiny.model, replace(made, config=config))
    return found


@pytest.mark.parametrize(
    ("top", "nested", "message"),
    [
        ({}, {"sample_from_anchor": True}, "strategy.label_layout=next_token"),
        ({"sample_from_anchor": True}, {}, "strategy.label_layout=next_token"),
        (
            {},
            {"sample_from_anchor": True, "label_layout": "same_position"},
            "strategy.label_layout=next_token",
        ),
        ({}, {"attention_value_scale": 0.5}, "trained with attention_value_scale 0.5"),
        ({}, {"attention_sink_bias": True}, "trained with attention_sink_bias True"),
        ({"rope_is_neox_style": False}, {}, "trained with rope_is_neox_style False"),
        ({}, {"use_swa": True, "swa_window_size": 9}, "trained with use_swa True"),
        (SLIDING, {}, r"layer_types \['full_attention', 'sliding_attention'\], this run"),
    ],
)
def test_what_no_tensor_shows_is_compared(
    kit: Any, top: dict[str, Any], nested: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(kit, kit.tiny(), top, nested)


def test_the_same_said_of_a_draft_that_is_so_is_read(kit: Any) -> None:
    plain = {"attention_value_scale": 1.0, "attention_sink_bias": False, "use_swa": False}
    assert load(kit, kit.tiny(), {}, {"sample_from_anchor": False, **plain})
    assert load(kit, kit.tiny(label_layout="next_token"), {"sample_from_anchor": True}, {})
    half = ["full_attention", "sliding_attention"]
    assert load(kit, kit.tiny(sliding_window=6, layer_types=half), SLIDING, {})
