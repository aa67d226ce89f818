from __future__ import annotations

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from specforge_core.drafts.dialects import from_layer_inputs, layer_inputs, rope_fields
from specforge_core.nn.rotary import draft_rope

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


def test_both_spellings() -> None:
    fields = rope_fields(LLAMA3)
    assert fields["rope_parameters"] == LLAMA3
    assert fields["rope_theta"] == 500000.0
    assert fields["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    plain = {"rope_type": "default", "rope_theta": 1e6}
    assert rope_fields(plain) == {
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rope_parameters": plain,
    }


def test_what_was_given_is_left_as_it_was() -> None:
    rope = dict(LLAMA3)
    rope_fields(rope)["rope_parameters"]["rope_theta"] = 1.0
    assert rope == LLAMA3


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
    fields = rope_fields(draft_rope(config.to_dict()))
    expected = {k: v for k, v in config.rope_parameters.items() if k != "type"}
    new = type(config)(rope_parameters=fields["rope_parameters"])
    old = type(config)(rope_theta=fields["rope_theta"], rope_scaling=fields["rope_scaling"])
    both = type(config)(**fields)
    for loaded in (new, old, both):
        assert loaded.rope_parameters == expected
