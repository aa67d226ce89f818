"""Options, and what they come to for a target."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from specforge_dflash.config import capture_layers, draft_shape

from specforge_core.errors import ConfigError
from specforge_core.nn.rotary import draft_rope


@pytest.mark.parametrize(
    ("num_layers", "count", "want"),
    [
        (36, 5, [1, 9, 17, 25, 33]),  # Qwen3-8B
        (40, 8, [1, 6, 11, 16, 22, 27, 32, 37]),  # Qwen3.5-35B
        (30, 1, [15]),
        (5, 2, [1, 2]),
        (7, 3, [1, 2, 4]),  # 2.5 rounds to even
        (9, 3, [1, 4, 6]),  # 3.5 rounds to even
    ],
)
def test_default_layers_follow_the_published_formula(
    kit: Any, num_layers: int, count: int, want: list[int]
) -> None:
    assert list(capture_layers(kit.config(num_capture_layers=count), num_layers)) == want


def test_the_number_of_captured_layers_is_that_of_the_draft_unless_set(kit: Any) -> None:
    assert len(capture_layers(kit.config(num_layers=5), 36)) == 5
    assert len(capture_layers(kit.config(num_layers=5, num_capture_layers=8), 36)) == 8


def test_small_targets_need_their_layers_named(kit: Any) -> None:
    with pytest.raises(ConfigError, match=r"3 layers is too small .* Try: strategy.layers=\[0\]"):
        capture_layers(kit.config(), 3)
    assert capture_layers(kit.config(layers=[0]), 3) == (0,)


def test_a_layer_is_never_read_twice(kit: Any) -> None:
    with pytest.raises(ConfigError, match=r"would be \[1, 2, 2, 2, 3\].*num_capture_layers=3"):
        capture_layers(kit.config(num_layers=5), 6)


@pytest.mark.parametrize("layers", [[], [3, 3], [4, 2], [-1, 2], [0, 7]])
def test_bad_layers_are_refused(kit: Any, layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"within 0\.\.6 for a target of 8 layers\. Try: "):
        capture_layers(kit.config(layers=layers), 8)


@pytest.mark.parametrize(("block", "gamma"), [(8, 4.0), (10, 5.0), (16, 7.0), (4, 2.0)])
def test_the_decay_follows_the_block_size(kit: Any, block: int, gamma: float) -> None:
    assert kit.config(block_size=block).gamma == gamma
    assert kit.config(block_size=block, decay_gamma=3.0).gamma == 3.0


def test_a_block_drafts_one_token_fewer_when_slot_0_predicts_nothing(kit: Any) -> None:
    assert kit.config(block_size=16).num_draft_tokens == 15
    assert kit.config(block_size=16, label_layout="next_token").num_draft_tokens == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": ["full_attention"]}, "names 1 layers, num_layers is 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "set sliding_window"),
        ({"decay_gamma": 4.0, "weighting": "dpace"}, "no effect with weighting 'dpace'"),
        ({"block_size": 1}, "block_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"bloc_size": 8}, "bloc_size"),
    ],
)
def test_options_that_disagree_are_refused(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kit.config(**options)


def test_sizes_come_from_the_target_unless_set(kit: Any) -> None:
    shape = draft_shape(kit.config(), kit.target(), 40)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 8)
    assert (shape.hidden_size, shape.intermediate_size, shape.vocab_size) == (24, 40, 41)
    small = kit.config(num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32)
    shape = draft_shape(small, kit.target(head_dim=None), 40)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 1, 16)
    assert draft_shape(kit.config(), kit.target(head_dim=None), 40).head_dim == 6


def test_sliding_layers_are_all_or_named(kit: Any) -> None:
    both = draft_shape(kit.config(sliding_window=5), kit.target(), 40)
    assert both.layer_types == ("sliding_attention", "sliding_attention")
    types = ("sliding_attention", "full_attention")
    one = draft_shape(kit.config(sliding_window=5, layer_types=types), kit.target(), 40)
    assert (one.layer_types, one.sliding_window) == (types, 5)
    none = draft_shape(kit.config(), kit.target(), 40)
    assert (none.layer_types, none.sliding_window) == (("full_attention",) * 2, None)


def test_heads_that_do_not_divide_are_refused(kit: Any) -> None:
    with pytest.raises(ConfigError, match="3 attention heads cannot share 2 key/value heads"):
        draft_shape(kit.config(num_heads=3), kit.target(), 40)


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("found", "want"),
    [
        # transformers 5, with a partial rotation that a draft must not copy
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}}, PLAIN),
        # transformers 4
        ({"rope_theta": 1e6, "rope_scaling": None}, PLAIN),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, YARN),
        # one set per layer type
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}, LINEAR),
        # multimodal sections are plain RoPE on text
        ({"rope_parameters": {**PLAIN, "mrope_section": [1, 2]}}, PLAIN),
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_rope_is_the_targets_over_the_whole_head(
    kit: Any, found: dict[str, Any], want: dict[str, Any]
) -> None:
    assert draft_rope(found, kit.config().rope_theta) == want


def test_rope_that_changes_with_length_becomes_plain(kit: Any) -> None:
    found = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert draft_rope(found, kit.config().rope_theta) == plain
    other = {"rope_type": "default", "rope_theta": 500.0}
    assert draft_rope(found, kit.config(rope_theta=500.0).rope_theta) == other
