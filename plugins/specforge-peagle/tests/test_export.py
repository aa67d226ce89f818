"""The published layout against what vLLM's loader is known to read.  vLLM is not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_peagle import specforge_export, specforge_import

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export

# parameters of vLLM's class for 2 layers; q, k, v and gate, up go into joined ones
LAYER = {
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}
KNOWN = {
    *(f"layers.{i}.{name}" for i in range(2) for name in LAYER),
    *("layers.0.hidden_norm.weight", "fc.weight", "norm.weight", "lm_head.weight"),
    *("mask_hidden", "d2t", "t2d"),
}


def export(tiny: Any, format: str = "vllm") -> Export:
    made: Export | None = specforge_export(tiny.config, tiny.draft, tiny.target, format)
    assert made is not None
    json.dumps(made.config)
    return made


def test_vllm_finds_the_class_the_mask_and_every_tensor(kit: Any) -> None:
    made = export(kit.tiny())
    # with another name, vLLM would put "Eagle3" before it and know no such class
    assert made.config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert made.config["num_hidden_layers"] == 2
    assert made.config["mask_token_id"] == made.config["pard_token"] == 28
    assert made.config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # by inputs
    assert made.config["norm_before_residual"] is made.config["norm_output"] is False
    assert made.weights.keys() == KNOWN | {"embed_tokens.weight"}
    assert made.weights["mask_hidden"].shape == (1, 1, 72)
    assert made.weights["layers.0.self_attn.q_proj.weight"].shape == (32, 48)
    assert made.weights["layers.1.self_attn.q_proj.weight"].shape == (32, 24)
    assert made.serve == {
        "vllm": {"method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 4}
    }
    assert made.environment == {"vllm": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
    assert export(kit.tiny(draft_length=3)).serve["vllm"]["num_speculative_tokens"] == 3


def test_an_embedding_that_is_the_targets_is_shared(kit: Any) -> None:
    tiny = kit.tiny(train_embedding=False)
    assert export(tiny).weights.keys() == KNOWN
    whole = export(tiny, "hf").weights["embed_tokens.weight"]
    assert torch.equal(whole, tiny.embed.bfloat16())


def test_normed_queries_go_to_vllm_in_the_speculators_form(kit: Any) -> None:
    made = export(kit.tiny(layer_type="qwen3"))
    assert made.config["speculators_model_type"] == "peagle"
    assert made.config["architectures"] == ["PEagleSpeculator"]
    assert made.config["mask_token_id"] == 28
    assert made.config["transformer_layer_config"]["model_type"] == "qwen3"
    assert made.config["transformer_layer_config"]["num_hidden_layers"] == 2
    assert made.weights["layers.1.self_attn.q_norm.weight"].shape == (8,)


@pytest.mark.parametrize("format", ["hf", "vllm"])
@pytest.mark.parametrize(
    "options",
    [{}, {"train_embedding": False}, {"layer_type": "qwen3", "draft_vocab_size": "full"}],
    ids=str,
)
def test_an_export_is_read_back(kit: Any, format: str, options: dict[str, Any]) -> None:
    tiny, other = (kit.tiny(export_dtype="float32", seed=s, **options) for s in (0, 9))
    assert specforge_import(other.draft, export(tiny, format))
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weight), name


def test_other_spellings_are_read(kit: Any) -> None:
    """`midlayer` for the first layer, a flat mask state, and the mask token by one name."""
    tiny, other = (kit.tiny(export_dtype="float32", seed=s) for s in (0, 9))
    made = export(tiny)
    config = {n: v for n, v in made.config.items() if n not in ("mask_token_id", "pard_token")}
    weights = {n.replace("layers.0.", "midlayer."): w for n, w in made.weights.items()}
    weights["mask_hidden"] = weights["mask_hidden"].flatten()
    del weights["t2d"]
    assert specforge_import(other.draft, replace(made, config=config, weights=weights))
    assert torch.equal(other.model.mask_hidden, tiny.model.mask_hidden)


def test_what_is_not_served_is_refused(kit: Any) -> None:
    tiny = kit.tiny()
    with pytest.raises(ConfigError, match=r"SGLang .* has no P-EAGLE"):
        export(tiny, "sglang")
    assert specforge_export(tiny.config, tiny.draft, tiny.target, "other") is None


def changed(**changes: Any) -> Callable[[Export], Export]:
    return lambda made: replace(made, config={**made.config, **changes})


def without(*names: str) -> Callable[[Export], Export]:
    return lambda made: replace(
        made, weights={n: w for n, w in made.weights.items() if n not in names}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(num_hidden_layers=4), "strategy.num_layers=4"),
        (changed(mask_token_id=None, pard_token=7), "strategy.mask_token_id=7"),
        (changed(norm_before_residual=True), "norm_before_residual"),
        (changed(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}), "layers"),
        (changed(num_attention_heads="x"), "num_heads x"),
        (without("embed_tokens.weight"), "strategy.train_embedding=false"),
        (without("d2t", "t2d"), "strategy.draft_vocab_size=full"),
        (without("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_draft_made_for_another_run_is_refused_and_nothing_is_loaded(
    kit: Any, change: Callable[[Export], Export], message: str
) -> None:
    tiny, other = kit.tiny(), kit.tiny(seed=9)
    before = {name: w.clone() for name, w in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        specforge_import(other.draft, change(export(tiny)))
    assert all(torch.equal(w, before[n]) for n, w in other.model.state_dict().items())


def test_an_eagle3_draft_is_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    assert not specforge_import(tiny.draft, without("mask_hidden")(export(tiny)))
