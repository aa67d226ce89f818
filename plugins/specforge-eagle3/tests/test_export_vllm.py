"""The vllm export, key by key, against what vLLM's loader is known to read.  vLLM is not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from specforge_eagle3.export import specforge_export

from specforge_core.types import Export

OUTPUTS = [1, 3, 4]  # the layers of the tiny draft, counted by outputs
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
LAYER: dict[str, Any] = {
    "num_hidden_layers": 1,  # more are read differently by SGLang and vLLM
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,  # the target's: vLLM clamps RoPE to it
    "rope_theta": 1000.0,  # both spellings
    "rope_scaling": None,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
    "vocab_size": 29,  # the target's
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
NORMS = {
    "fc_norm": False,
    "norm_output": False,
    "norm_before_residual": False,  # vLLM's default is another one for speculators' configs
    "norm_before_fc": False,
}


def exported(kit: Any, **options: Any) -> Export:
    tiny = kit.tiny(**options)
    made = specforge_export(tiny.config, tiny.draft, tiny.target, "vllm")
    assert made is not None
    return made


def vllm_layers(config: Mapping[str, Any]) -> list[int]:
    """Return the layers in vLLM's own count, by inputs, in its order of looking for them."""
    dflash: Mapping[str, Any] = config.get("dflash_config") or {}
    if "eagle_aux_hidden_state_layer_ids" in config:
        return list(config["eagle_aux_hidden_state_layer_ids"])
    if "target_layer_ids" in dflash:
        return [i + 1 for i in dflash["target_layer_ids"]]
    raise AssertionError("vLLM would take its own default")


def loaded(name: str) -> str:
    """Return the parameter that vLLM loads a tensor into."""
    name = name.replace("midlayer.", "layers.0.").replace("d2t", "draft_id_to_target_id")
    return name if name.startswith("lm_head") else f"model.{name}"


def test_every_key_of_the_config(kit: Any) -> None:
    assert exported(kit).config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **LAYER,
        "draft_vocab_size": 17,
        "num_aux_hidden_states": 3,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": OUTPUTS,  # SGLang's; vLLM does not look here
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],  # vLLM's
        **NORMS,
    }


def test_every_key_of_a_speculators_config(kit: Any) -> None:
    made = exported(kit, layer_type="qwen3", draft_length=5).config
    assert made == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "tiny", "architectures": []},
        },
        "transformer_layer_config": {"model_type": "qwen3", **LAYER},
        "draft_vocab_size": 17,
        "target_hidden_size": None,  # else it would not share the target's embedding
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        **NORMS,
    }


@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_vllm_takes_the_layers_that_were_trained_on(kit: Any, layer_type: str) -> None:
    found = vllm_layers(exported(kit, layer_type=layer_type).config)
    assert [i - 1 for i in found] == OUTPUTS


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, set()),
        ({"fc_norm": True}, {f"model.fc_norm.{i}.weight" for i in range(3)}),
        (
            {"layer_type": "qwen3"},
            {
                "model.embed_tokens.weight",
                "model.layers.0.self_attn.q_norm.weight",
                "model.layers.0.self_attn.k_norm.weight",
            },
        ),
    ],
)
def test_every_tensor_has_a_parameter_in_vllm(
    kit: Any, options: dict[str, Any], more: set[str]
) -> None:
    """An unknown key is an error there, except t2d, which is skipped."""
    weights = exported(kit, **options).weights
    layer = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    layer += tuple(f"self_attn.{n}_proj" for n in "qkvo")
    layer += tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
    want = {f"model.layers.0.{name}.weight" for name in layer} | more
    want |= {"model.fc.weight", "model.norm.weight", "lm_head.weight"}
    want |= {"model.draft_id_to_target_id", "model.t2d"}
    assert {loaded(name) for name in weights} == want
    assert weights["d2t"].dtype == torch.int64  # offsets
    assert weights["t2d"].dtype == torch.bool
