"""The published layout key by key, what engines cannot serve, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_eagle3.export import specforge_export
from specforge_eagle3.importer import specforge_import
from torch import Tensor

from specforge_core.drafts.export import read_export, write_export
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.strategy import WRONG_VALUE
from specforge_core.types import Export

H, VD, V, I, Q, KV = 24, 17, 29, 40, 32, 16  # noqa: E741
LAYER = {
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.self_attn.q_proj.weight": (Q, 2 * H),
    "midlayer.self_attn.k_proj.weight": (KV, 2 * H),
    "midlayer.self_attn.v_proj.weight": (KV, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, Q),
    "midlayer.post_attention_layernorm.weight": (H,),
    "midlayer.mlp.gate_proj.weight": (I, H),
    "midlayer.mlp.up_proj.weight": (I, H),
    "midlayer.mlp.down_proj.weight": (H, I),
}
REST = {
    "fc.weight": (H, 3 * H),
    "norm.weight": (H,),
    "lm_head.weight": (VD, H),
    "d2t": (VD,),
    "t2d": (V,),
}
FC_NORM = {f"fc_norm.{i}.weight": (H,) for i in range(3)}
QK_NORM = {f"midlayer.self_attn.{n}_norm.weight": (8,) for n in "qk"}
EMBED = {"embed_tokens.weight": (V, H)}


def exported(kit: Any, format: str, **options: Any) -> tuple[Any, Export]:
    tiny = kit.tiny(**options)
    export = specforge_export(tiny.config, tiny.draft, tiny.target, format)
    assert export is not None
    return tiny, export


def shapes(export: Export) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in export.weights.items()}


@pytest.mark.parametrize(
    ("format", "options", "want"),
    [
        ("hf", {}, {**LAYER, **REST, **EMBED}),
        ("sglang", {}, {**LAYER, **REST}),
        ("vllm", {}, {**LAYER, **REST}),
        ("sglang", {"fc_norm": True, "norm_output": True}, {**LAYER, **REST, **FC_NORM}),
        ("hf", {"layer_type": "qwen3"}, {**LAYER, **QK_NORM, **REST, **EMBED}),
    ],
)
def test_tensors_are_the_published_ones(
    kit: Any, format: str, options: dict[str, Any], want: dict[str, tuple[int, ...]]
) -> None:
    _, export = exported(kit, format, **options)
    assert shapes(export) == want
    kinds = {n: v.dtype for n, v in export.weights.items()}
    assert kinds.pop("d2t") == torch.int64
    assert kinds.pop("t2d") == torch.bool
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize("format", ["hf", "sglang", "vllm"])
def test_config_says_what_both_engines_read(kit: Any, format: str) -> None:
    _, export = exported(kit, format, norm_output=True)
    found = dict(export.config)
    assert found["architectures"] == ["LlamaForCausalLMEagle3"]
    assert found["model_type"] == "llama"
    assert found["num_hidden_layers"] == 1
    assert found["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # outputs
    assert found["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # inputs
    assert found["num_aux_hidden_states"] == 3
    assert found["tie_word_embeddings"] is False
    assert (found["vocab_size"], found["draft_vocab_size"]) == (V, VD)
    assert (found["norm_output"], found["fc_norm"]) == (True, False)
    assert (found["norm_before_residual"], found["norm_before_fc"]) == (False, False)
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 1000.0
    assert found["rope_scaling"] is None
    assert found["max_position_embeddings"] == 256
    assert (found["head_dim"], found["num_key_value_heads"]) == (8, 2)


def test_d2t_holds_offsets(kit: Any) -> None:
    tiny, export = exported(kit, "sglang")
    tokens = export.weights["d2t"] + torch.arange(VD)
    assert tokens.tolist() == export.weights["t2d"].nonzero().squeeze(1).tolist()
    assert torch.equal(export.weights["lm_head.weight"], tiny.model.lm_head.weight.bfloat16())


def test_a_full_vocabulary_keeps_its_own_head(kit: Any) -> None:
    _, export = exported(kit, "sglang", draft_vocab_size="full")
    assert export.config["draft_vocab_size"] == V  # without it SGLang takes the target's head
    assert not export.weights["d2t"].any()
    assert bool(export.weights["t2d"].all())


def test_normed_queries_go_to_vllm_by_the_speculators_format(kit: Any) -> None:
    _, export = exported(kit, "vllm", layer_type="qwen3")
    found = export.config
    assert found["speculators_model_type"] == "eagle3"
    assert found["transformer_layer_config"]["model_type"] == "qwen3"
    assert found["transformer_layer_config"]["tie_word_embeddings"] is False
    assert found["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert found["norm_before_residual"] is False
    assert found["speculators_config"]["verifier"]["name_or_path"] == "tiny"
    names = export.weights.keys()
    assert "layers.0.self_attn.q_norm.weight" in names
    assert not any(n.startswith("midlayer") for n in names)


def test_it_says_how_it_is_served(kit: Any) -> None:
    _, chain = exported(kit, "sglang", draft_length=5)
    assert chain.serve["sglang"] == {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 5,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 6,
    }
    assert chain.serve["vllm"] == {"method": "eagle3", "num_speculative_tokens": 5}
    assert chain.base == "tiny"
    _, tree = exported(kit, "hf", draft_length=5, tree_top_k=4, tree_tokens=12)
    flags = tree.serve["sglang"]
    assert (flags["speculative_eagle_topk"], flags["speculative_num_draft_tokens"]) == (4, 13)
    _, normed = exported(kit, "vllm", layer_type="qwen3")
    assert normed.serve.keys() == {"vllm"}  # SGLang would leave its norms out


@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_its_own_keys_have_a_cause(kit: Any, layer_type: str) -> None:
    _, export = exported(kit, "vllm", layer_type=layer_type)
    assert export.causes["d2t"] == export.causes["draft_vocab_size"] == "vocabulary map"
    assert {"d2t", "t2d"} <= export.causes.keys() & export.weights.keys()
    layer_ids = [name for name in export.config if name.endswith("layer_ids")]
    assert {export.causes[name] for name in layer_ids} == {"layer ids"}
    norms = [n for n in export.config if n.startswith(("norm_", "fc_norm"))]
    assert len(norms) == 4
    assert {export.causes[name] for name in norms} == {"norms"}


def test_normed_queries_are_refused_for_sglang(kit: Any) -> None:
    tiny = kit.tiny(layer_type="qwen3")
    with pytest.raises(ConfigError, match="SGLang serves EAGLE-3 drafts without norms on queries"):
        specforge_export(tiny.config, tiny.draft, tiny.target, "sglang")


def test_an_unknown_format_is_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    assert specforge_export(tiny.config, tiny.draft, tiny.target, "gguf") is None


# ---- the way back ------------------------------------------------------------


def respell(weights: dict[str, Tensor], layer: str, prefix: str, d2t: str) -> dict[str, Tensor]:
    out = {}
    for name, value in weights.items():
        name = name.replace("midlayer.", layer).replace("d2t", d2t)
        out[name if name == "lm_head.weight" else prefix + name] = value
    return out


@pytest.mark.parametrize("layer", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("d2t", ["d2t", "draft_id_to_target_id"])
def test_every_spelling_is_read_bit_for_bit(
    kit: Any, tmp_path: Path, layer: str, prefix: str, d2t: str
) -> None:
    tiny, export = exported(kit, "hf", fc_norm=True, export_dtype="float32")
    weights = respell(dict(export.weights), layer, prefix, d2t)
    write_export(Export(config=export.config, weights=weights), tmp_path / "draft", {})
    other = kit.tiny(fc_norm=True, seed=7)
    other.model.d2t.zero_()
    assert specforge_import(other.draft, read_export(tmp_path / "draft"))
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.mark.parametrize("format", ["hf", "sglang", "vllm"])
@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_an_export_of_an_import_is_the_same_file(kit: Any, format: str, layer_type: str) -> None:
    if (format, layer_type) == ("sglang", "qwen3"):
        return
    _, export = exported(kit, format, layer_type=layer_type)
    other = kit.tiny(seed=3, layer_type=layer_type)
    assert specforge_import(other.draft, export)
    again = specforge_export(other.config, other.draft, other.target, format)
    assert again is not None
    assert again.config == export.config
    assert all(torch.equal(again.weights[n], v) for n, v in export.weights.items())


def test_legacy_norm_names_are_read(kit: Any) -> None:
    tiny, export = exported(kit, "sglang", fc_norm=True, export_dtype="float32")
    weights = dict(export.weights)
    for i, name in enumerate(("low", "mid", "high")):
        weights[f"aux_norm_{name}.weight"] = weights.pop(f"fc_norm.{i}.weight")
    config = dict(export.config)
    del config["fc_norm"]
    other = kit.tiny(fc_norm=True, seed=3)
    specforge_import(other.draft, Export(config={**config, "use_aux_norm": True}, weights=weights))
    assert torch.equal(other.model.fc_norm[2].weight, tiny.model.fc_norm[2].weight)


def test_another_strategys_export_is_left_to_others(kit: Any) -> None:
    tiny = kit.tiny()
    assert not specforge_import(tiny.draft, Export(config={"architectures": ["X"]}, weights={}))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"norm_output": True}, r"norm_output True, this run False. Try: strategy.norm_output=True"),
    ({"fc_norm": True}, "fc_norm True, this run False"),
    ({"norm_before_residual": True}, "trained with norm_before_residual"),
    ({"norm_before_fc": True}, "trained with norm_before_fc"),
    ({"num_hidden_layers": 2}, "has 2 layers, and engines disagree"),
    ({"target_hidden_size": 64}, "reads states of size 64"),
    ({"draft_vocab_size": 18}, r"Try: strategy.draft_vocab_size=18"),
    (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}},
        r"layers \[0, 2, 5\], this run \[1, 3, 4\]",
    ),
    (
        {"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
        r"layers \[0, 2, 5\], this run \[1, 3, 4\]",
    ),
    (  # what another engine reads, which contradicts the section eagle_config
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
        r"layers \[0, 2, 5\], this run \[1, 3, 4\]",
    ),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta 5.0"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
        "rope parameters {'rope_type': 'linear'.*, this run {'rope_type': 'default'",
    ),
    ({"rms_norm_eps": 1e-3}, "has rms_norm_eps 0.001, this run 1e-06. Try the target it was"),
    ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan, this run 1e-06"),
    ({"hidden_act": "gelu"}, "has hidden_act gelu, this run silu"),
    ({"hidden_size": 48}, "has hidden_size 48, this run 24"),
    ({"num_attention_heads": 8}, "num_heads 8, this run 4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_would_be_accepted_nowhere_is_refused(
    kit: Any, change: dict[str, Any], message: str
) -> None:
    tiny, export = exported(kit, "sglang")
    with pytest.raises(CheckpointError, match=message):
        specforge_import(tiny.draft, replace(export, config={**export.config, **change}))


@pytest.mark.parametrize("change", [{"rope_parameters": "x"}, {"num_hidden_layers": None}])
def test_a_value_that_cannot_be_used_raises_what_the_core_tells_of(
    kit: Any, change: dict[str, Any]
) -> None:
    tiny, export = exported(kit, "sglang")
    with pytest.raises((ConfigError, *WRONG_VALUE)):
        specforge_import(tiny.draft, replace(export, config={**export.config, **change}))


def test_tensors_that_do_not_fit_are_named(kit: Any) -> None:
    tiny, export = exported(kit, "sglang")
    weights = {**export.weights, "fc.weight": torch.zeros(H, 2 * H)}
    with pytest.raises(CheckpointError, match=r"'fc.weight' has shape \(24, 48\), this draft"):
        specforge_import(tiny.draft, Export(config=export.config, weights=weights))
    extra = {**export.weights, "midlayer.self_attn.q_norm.weight": torch.zeros(8)}
    with pytest.raises(CheckpointError, match="this draft needs no such tensor"):
        specforge_import(tiny.draft, Export(config=export.config, weights=extra))
    missing = {n: v for n, v in export.weights.items() if n not in ("d2t", "t2d")}
    with pytest.raises(CheckpointError, match="has no d2t, so it drafts all 29 tokens"):
        specforge_import(tiny.draft, Export(config=export.config, weights=missing))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.float8_e4m3fn])
def test_an_embedding_that_no_engine_loads_is_refused(kit: Any, dtype: torch.dtype) -> None:
    tiny, export = exported(kit, "hf")
    own = tiny.frozen.embed_tokens
    weights = {**export.weights, "embed_tokens.weight": own.detach().to(dtype)}
    with pytest.raises(CheckpointError, match="has an embedding of its own"):
        specforge_import(tiny.draft, Export(config=export.config, weights=weights))


def test_an_embedding_of_its_own_is_refused(kit: Any) -> None:
    tiny, export = exported(kit, "hf")
    weights = {**export.weights, "embed_tokens.weight": export.weights["embed_tokens.weight"] + 1}
    with pytest.raises(CheckpointError, match="has an embedding of its own"):
        specforge_import(tiny.draft, Export(config=export.config, weights=weights))
