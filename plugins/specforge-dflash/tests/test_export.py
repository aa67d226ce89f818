"""The published layout key by key, and every mismatch that would load and then fail silently."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_dflash.export import export_draft, load_export

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.strategy import WRONG_VALUE
from specforge_core.types import Export


def test_config_of_a_full_attention_draft(kit: Any) -> None:
    made = kit.export(kit.tiny(), "sglang")
    assert made.config == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 4,
        "dflash_config": {
            "block_size": 4,
            "mask_token_id": 40,
            "target_layer_ids": [1, 5],  # outputs of layers, from 0
            "label_layout": "same_position",
            "sample_from_anchor": False,
            "num_draft_tokens": 3,  # not the number of slots
        },
        "num_target_layers": 8,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "rope_theta": 1000.0,
        "rope_scaling": None,
        # the target rotates half of each head; engines rotate all of a draft's
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "tie_word_embeddings": False,  # although the target's is true
        "vocab_size": 41,
        "dtype": "bfloat16",
    }
    json.dumps(made.config)


def test_config_of_a_sliding_draft(kit: Any) -> None:
    types = ["full_attention", "sliding_attention"]
    made = kit.export(kit.tiny(sliding_window=6, layer_types=types, softcap=30.0)).config
    assert made["layer_types"] == types
    assert (made["sliding_window"], made["use_sliding_window"]) == (6, True)
    assert made["max_window_layers"] == 1
    assert made["final_logit_softcapping"] == 30.0


def test_transformers_reads_the_config_as_a_qwen3(kit: Any) -> None:
    from transformers import Qwen3Config

    found = Qwen3Config(**kit.export(kit.tiny()).config)
    assert (found.head_dim, found.rope_parameters["rope_theta"]) == (8, 1000.0)
    assert found.dflash_config["target_layer_ids"] == [1, 5]


def test_tensors_are_the_published_ones(kit: Any) -> None:
    weights = kit.export(kit.tiny()).weights
    layer = {
        "self_attn.q_proj.weight": (32, 24),
        "self_attn.k_proj.weight": (16, 24),
        "self_attn.v_proj.weight": (16, 24),
        "self_attn.o_proj.weight": (24, 32),
        "self_attn.q_norm.weight": (8,),
        "self_attn.k_norm.weight": (8,),
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "mlp.gate_proj.weight": (40, 24),
        "mlp.up_proj.weight": (40, 24),
        "mlp.down_proj.weight": (24, 40),
    }
    want = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    want |= {"fc.weight": (24, 48), "hidden_norm.weight": (24,), "norm.weight": (24,)}
    assert {name: tuple(value.shape) for name, value in weights.items()} == want
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reloading_reproduces_the_logits_bit_for_bit(kit: Any, dtype: str) -> None:
    tiny = kit.tiny(export_dtype=dtype)
    made = kit.export(tiny)
    other = kit.tiny(export_dtype=dtype, seed=9)
    batch = kit.batch(tiny.config, kit.samples((19,)))
    slots = tiny.frozen.embed(batch["block_ids"].flatten(1))
    where = batch["anchors"], batch["starts"], batch["position_ids"]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        states = model.to(getattr(torch, dtype))(batch["hidden_states"], slots, *where)
        return tiny.frozen.logits(states)

    before = logits(other.model)
    other.model.float()
    assert load_export(other.config, other.model, made)
    assert torch.equal(logits(other.model), logits(tiny.model))
    assert not torch.equal(before, logits(other.model))
    again = kit.export(other)
    assert again.config == made.config
    assert all(torch.equal(again.weights[name], value) for name, value in made.weights.items())


def test_every_key_of_the_methods_own_has_a_cause(kit: Any) -> None:
    made = kit.export(kit.tiny(causal=True))
    assert made.causes.keys() == made.config["dflash_config"].keys() | {"is_causal"}
    assert made.causes["sample_from_anchor"] == made.causes["label_layout"]


def test_an_unknown_format_is_left_to_the_core(kit: Any) -> None:
    tiny = kit.tiny()
    assert export_draft(tiny.config, tiny.draft, tiny.target, "gguf") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 8}, r"has block_size 4, this run 8. Try: strategy.block_size=4"),
        ({"layers": [2, 6]}, r"has layers \[1, 5\], this run \[2, 6\]"),
        ({"label_layout": "next_token"}, "has label_layout same_position, this run next_token"),
        ({"num_layers": 3, "num_capture_layers": 2}, "has num_layers 2, this run 3"),
        ({"sliding_window": 4}, r"has layer_types \['full_attention'"),
        ({"num_heads": 2}, "has num_heads 4, this run 2"),
        ({"head_dim": 4}, "has head_dim 8, this run 4"),
        ({"rope_theta": 5.0}, "has rope_theta 1000.0, this run 5.0"),
        ({"intermediate_size": 48}, r"'layers.0.mlp.down_proj.weight' has shape \(24, 40\)"),
        ({"num_kv_heads": 1}, r"'layers.0.self_attn.k_proj.weight' has shape \(16, 24\)"),
    ],
)
def test_exports_of_another_draft_are_refused(
    kit: Any, options: dict[str, Any], message: str
) -> None:
    made, other = kit.export(kit.tiny()), kit.tiny(**options)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_export(other.config, other.model, made)
    assert all(torch.equal(value, before[n]) for n, value in other.model.state_dict().items())


def test_another_window_is_refused(kit: Any) -> None:
    made, other = kit.export(kit.tiny(sliding_window=6)), kit.tiny(sliding_window=4)
    with pytest.raises(CheckpointError, match="has sliding_window 6, this run 4"):
        load_export(other.config, other.model, made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": 1e-5}, r"has rms_norm_eps 1e-05, this run 1e-06\. Try the target it was"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan, this run 1e-06"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu, this run silu"),
        ({"hidden_size": 48}, "has hidden_size 48, this run 24"),
        ({"vocab_size": 40}, "has vocab_size 40, this run 41"),
        ({"final_logit_softcapping": 30.0}, "has softcap 30.0, this run None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "has rope_theta 1000.0|rope"),
        ({"mask_token_id": 7}, "says mask_token_id 7, and in dflash_config 40"),
    ],
)
def test_a_config_that_was_edited_is_refused(
    kit: Any, change: dict[str, Any], message: str
) -> None:
    tiny = kit.tiny()
    made = kit.export(tiny)
    with pytest.raises(CheckpointError, match=message):
        load_export(tiny.config, tiny.model, replace(made, config={**made.config, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "dynamic"}},
        {"rope_parameters": "x"},
        {"num_hidden_layers": "many"},
        {"layer_types": 3},
        {"dflash_config": [[]]},
    ],
)
def test_a_value_that_cannot_be_used_raises_what_the_core_tells_of(
    kit: Any, change: dict[str, Any]
) -> None:
    tiny = kit.tiny()
    made = kit.export(tiny)
    with pytest.raises((ConfigError, *WRONG_VALUE)):
        load_export(tiny.config, tiny.model, replace(made, config={**made.config, **change}))


def test_quantised_tensors_are_refused(kit: Any) -> None:
    tiny = kit.tiny()
    made = kit.export(tiny)
    weights = {**made.weights, "norm.weight": made.weights["norm.weight"].to(torch.int8)}
    with pytest.raises(CheckpointError, match=r"'norm\.weight' has dtype int8, this draft needs"):
        load_export(tiny.config, tiny.model, replace(made, weights=weights))
    nameless = replace(made, config={**made.config, "architectures": None})
    assert not load_export(tiny.config, tiny.model, nameless)


def test_another_mask_token_is_refused(kit: Any) -> None:
    tiny = kit.tiny()
    made = kit.export(tiny)
    nested = {**made.config["dflash_config"], "mask_token_id": 39}
    with pytest.raises(CheckpointError, match=r"mask_token_id 39, this run 40. Try: strategy.mask"):
        load_export(
            tiny.config, tiny.model, replace(made, config={**made.config, "dflash_config": nested})
        )


def test_missing_and_unknown_tensors_are_refused(kit: Any) -> None:
    tiny = kit.tiny()
    made = kit.export(tiny)
    fewer = {k: v for k, v in made.weights.items() if k != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"'norm.weight' has shape none.* needs \(24,\)"):
        load_export(tiny.config, tiny.model, replace(made, weights=fewer))
    more = {**made.weights, "mask_hidden": torch.zeros(24)}
    with pytest.raises(CheckpointError, match=r"'mask_hidden' .* no such tensor"):
        load_export(tiny.config, tiny.model, replace(made, weights=more))


def test_fc_of_other_layers_is_refused(kit: Any) -> None:
    """The one mismatch engines notice themselves."""
    tiny = kit.tiny()
    made = kit.export(tiny)
    weights = {**made.weights, "fc.weight": torch.zeros(24, 72)}
    with pytest.raises(CheckpointError, match=r"'fc.weight' has shape \(24, 72\)"):
        load_export(tiny.config, tiny.model, replace(made, weights=weights))


@pytest.mark.parametrize("sliding", [{}, {"sliding_window": 6}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_which_slots_a_slot_sees_is_said_and_compared(
    kit: Any, causal: bool, sliding: dict[str, Any]
) -> None:
    """SGLang reads it at the top, vLLM in either place; both take it for all layers."""
    tiny = kit.tiny(causal=causal, **sliding)
    made = kit.export(tiny, "sglang")
    nested = made.config["dflash_config"]
    said = (made.config.get("is_causal"), nested.get("causal"))
    assert said == ((True, True) if causal else (None, None))
    assert load_export(tiny.config, tiny.model, made)
    stated = replace(made, config={**made.config, "is_causal": True})
    if causal or sliding:  # sliding layers are causal at any rate
        assert load_export(tiny.config, tiny.model, stated)
    else:
        with pytest.raises(CheckpointError, match=r"causal True, this run False. Try: strategy"):
            load_export(tiny.config, tiny.model, stated)
    stated = replace(
        made,
        config={
            **made.config,
            "is_causal": False,
            "dflash_config": {n: x for n, x in nested.items() if n != "causal"},
        },
    )
    if causal or sliding:
        wanted = "whole block" if sliding else "causal False, this run True"
        with pytest.raises(CheckpointError, match=wanted):
            load_export(tiny.config, tiny.model, stated)
    else:
        assert load_export(tiny.config, tiny.model, stated)


def test_the_oldest_published_layout_is_read(kit: Any) -> None:
    """Block size and layers at the top level, rope_theta alone, no layout flag."""
    tiny = kit.tiny()
    made = kit.export(tiny)
    old = {k: v for k, v in made.config.items() if k not in ("rope_parameters", "layer_types")}
    old["dflash_config"] = {"mask_token_id": 40}
    old["target_layer_ids"] = [1, 5]
    assert load_export(tiny.config, tiny.model, replace(made, config=old))


def test_exports_of_other_strategies_are_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    foreign = Export(config={"architectures": ["LlamaForCausalLM"]}, weights={})
    assert not load_export(tiny.config, tiny.model, foreign)
