"""What each engine is given, what it is started with, and what it would serve otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from specforge_core.errors import ConfigError


@pytest.mark.parametrize("format", ["sglang", "vllm"])
def test_engines_that_read_slots_by_position_refuse_the_shifted_layout(
    kit: Any, format: str
) -> None:
    tiny = kit.tiny(label_layout="next_token")
    with pytest.raises(ConfigError, match=rf"{format} serves .*label_layout 'next_token': nothing"):
        kit.export(tiny, format)
    nested = kit.export(tiny).config["dflash_config"]
    assert (nested["label_layout"], nested["sample_from_anchor"]) == ("next_token", True)
    assert nested["num_draft_tokens"] == 4


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"bias": True}, ("sglang", "vllm")),
        ({"scale": 3.0, "model_type": "gemma2"}, ("sglang", "vllm")),
        ({"scale": 12.0, "model_type": "granite"}, ("sglang", "vllm")),
        ({"scale": 3.0, "model_type": "gemma3_text"}, ("vllm",)),
        ({"scale": 3.0, "model_type": "gemma4_text"}, ()),
    ],
)
def test_engines_that_leave_out_what_a_target_adds_refuse(
    kit: Any, options: dict[str, Any], refused: tuple[str, ...]
) -> None:
    """What they draft with is the target's bare embedding and head, in most targets."""
    tiny = kit.tiny(**options)
    kind, scale = options.get("model_type"), options.get("scale", 1.0)
    why = "has one" if "bias" in options else f"embeddings by {scale:g}, .* of {kind} without"
    for engine in refused:
        with pytest.raises(ConfigError, match=rf"{why}.* Try: --format hf"):
            kit.export(tiny, engine)
    assert kit.export(tiny).serve.keys() == {"sglang", "vllm"} - set(refused)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}])
def test_vllm_gets_the_published_layout_and_nothing_that_it_reads_otherwise(
    kit: Any, options: dict[str, Any]
) -> None:
    """Checked against what vLLM's loader is known to read; vLLM is not run."""
    tiny = kit.tiny(**options)
    made, published = kit.export(tiny, "vllm"), kit.export(tiny)
    assert made.config == published.config
    assert made.weights.keys() == published.weights.keys()
    nested = made.config["dflash_config"]
    # it adds 1 to these itself; a top-level field of its own would be taken as it is, and first
    assert nested["target_layer_ids"] == [1, 5]
    assert not {"eagle_aux_hidden_state_layer_ids", "target_layer_ids"} & made.config.keys()
    # either would make all layers causal, or none; without them those that slide are
    assert "is_causal" not in made.config
    assert not {"causal", "use_swa", "swa_window_size", "attention_sink_bias"} & nested.keys()
    # it would rotate a part of each head, scale logits, or draft from fewer tokens
    assert "partial_rotary_factor" not in made.config["rope_parameters"]
    assert not {"logit_scale", "draft_vocab_size", "is_neox_style"} & made.config.keys()
    assert "mask_hidden" not in made.weights  # an error there


@pytest.mark.parametrize("format", ["hf", "sglang", "vllm"])
def test_an_export_says_how_engines_serve_it(kit: Any, format: str) -> None:
    made = kit.export(kit.tiny(), format)
    assert made.serve == {
        "sglang": {"speculative_algorithm": "DFLASH"},  # the block's length is in config.json
        "vllm": {"method": "dflash", "num_speculative_tokens": 3},
    }
    assert kit.export(kit.tiny(label_layout="next_token")).serve == {}
