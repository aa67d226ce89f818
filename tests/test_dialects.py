from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from specforge_core.drafts.dialects import from_layer_inputs, layer_inputs, rope_fields
from specforge_core.errors import PluginError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def test_layer_ids_go_there_and_back() -> None:
    assert layer_inputs((-1, 1, 17, 32)) == [0, 2, 18, 33]
    assert from_layer_inputs([0, 2, 18, 33]) == [-1, 1, 17, 32]


def test_both_spellings_from_the_new_one() -> None:
    fields = rope_fields(LlamaConfig(rope_parameters=dict(LLAMA3)).to_dict())
    assert fields["rope_parameters"] == LLAMA3
    assert fields["rope_theta"] == 500000.0
    assert fields["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}


def test_both_spellings_from_the_old_one() -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert rope_fields({"rope_theta": 500000.0, "rope_scaling": scaling}) == rope_fields(
        {"rope_parameters": LLAMA3}
    )
    plain = rope_fields({"rope_theta": 1e6, "rope_scaling": None})
    assert plain == {
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    oldest = rope_fields({"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert oldest["rope_theta"] == 10000.0
    assert oldest["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(rope_parameters=dict(LLAMA3)),
        LlamaConfig(rope_theta=12345.0),
        LlamaConfig(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}),
        Qwen3Config(rope_theta=1e6),
    ],
    ids=["llama3", "plain", "linear", "qwen3"],
)
def test_transformers_understands_either_spelling(config: PreTrainedConfig) -> None:
    fields = rope_fields(config.to_dict())
    expected = {k: v for k, v in config.rope_parameters.items() if k != "type"}
    new = type(config)(rope_parameters=fields["rope_parameters"])
    old = type(config)(rope_theta=fields["rope_theta"], rope_scaling=fields["rope_scaling"])
    both = type(config)(**fields)
    for loaded in (new, old, both):
        assert loaded.rope_parameters == expected


def test_per_layer_type_parameters_are_chosen_by_name() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6).to_dict()
    assert rope_fields(config)["rope_theta"] == 1e6
    assert rope_fields(config, layer_type="sliding_attention")["rope_theta"] == 10000.0
    with pytest.raises(PluginError, match="full_attention, sliding_attention, not 'chunked'"):
        rope_fields(config, layer_type="chunked")


def test_what_a_draft_does_not_share_can_be_dropped() -> None:
    config: dict[str, Any] = {"rope_theta": 1e6, "partial_rotary_factor": 0.25}
    kept = rope_fields(config)
    assert kept["partial_rotary_factor"] == 0.25
    assert kept["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert kept["rope_scaling"] is None
    assert rope_fields(config, drop=["partial_rotary_factor"]) == rope_fields({"rope_theta": 1e6})
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    kept = rope_fields({"rope_parameters": sections})
    assert kept["rope_scaling"] == {"rope_type": "default", "mrope_section": [16, 24, 24]}
    assert (
        rope_fields({"rope_parameters": sections}, drop=["mrope_section"])["rope_scaling"] is None
    )


def test_the_config_is_left_as_it_was() -> None:
    config = {"rope_parameters": dict(LLAMA3)}
    rope_fields(config, drop=["factor"])["rope_parameters"]["rope_theta"] = 1.0
    assert config == {"rope_parameters": LLAMA3}


def test_a_limit_beside_the_parameters_is_found() -> None:
    config = {
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }
    assert rope_fields(config)["rope_parameters"]["original_max_position_embeddings"] == 4096
