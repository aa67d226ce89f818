"""The published layout key by key, and what would load and then fail silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_dflash import build_draft, specforge_export as export_plain
from specforge_lilicorr import specforge_export, specforge_import
from torch import Tensor

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export

CONVOLVED = {"conv_kernel_size": 2, "conv_group_size": 6}


def export(tiny: Any, format: str = "hf") -> Export:
    made: Export | None = specforge_export(
        config=tiny.config, draft=tiny.draft, target=tiny.target, format=format
    )
    assert made is not None
    return made


def lattice_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The lattice's tensors under their published names: width 16, 2 heads, 6 candidates."""
    linears = {
        "token_proj": (16, 24),
        "pass_hidden_proj": (16, 24),
        "context_proj": (16, 24),
        "feature_mlp.up_proj": (16, 5),
        "feature_mlp.down_proj": (16, 16),
        "factor_input_proj": (16, 48),
        "out_head": (6, 16),
        "in_head": (6, 16),
        "anchor_out_head": (6, 16),
    }
    norms = ["output_norm", "anchor_norm"]
    shapes: dict[str, tuple[int, ...]] = {
        "feature_norm.weight": (5,),
        "feature_norm.bias": (5,),
        "slot_embedding": (1, 1, 3, 1, 16),
        "rank_embedding": (1, 1, 1, 6, 16),
        "relative_slot_bias": (2, 7),
        "same_slot_bias": (2,),
    }
    for i in range(layers):
        shapes[f"layers.{i}.attn.in_proj_weight"] = (48, 16)
        shapes[f"layers.{i}.attn.in_proj_bias"] = (48,)
        linears[f"layers.{i}.attn.out_proj"] = (16, 16)
        linears[f"layers.{i}.mlp.up_proj"] = (24, 16)
        linears[f"layers.{i}.mlp.down_proj"] = (16, 24)
        norms += [f"layers.{i}.attn_norm", f"layers.{i}.mlp_norm"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.weight": (16,) for name in norms}
    return {f"lilicorr.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("options", [{}, CONVOLVED], ids=["plain", "convolved"])
def test_the_layout_is_dflashs_with_the_lattice(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(**options)
    plain = build_draft(
        tiny.config, tiny.target, tiny.frozen.embed_tokens, tiny.frozen.lm_head, mask_token_id=12
    )
    want: Any = export_plain(config=tiny.config, draft=plain, target=tiny.target, format="hf")
    made = export(tiny)
    nested = {
        **want.config["dflash_config"],
        "lilicorr_enabled": True,
        "lilicorr_candidate_topk": 6,
        "lilicorr_hidden_size": 16,
        "lilicorr_num_layers": 2,
        "lilicorr_num_heads": 2,
        "lilicorr_mlp_ratio": 1.5,
        "lilicorr_factor_dim": 6,
        "lilicorr_vector_eps": 1e-4,
        "lilicorr_logit_scale": 3.0,
        **options,
    }
    named = {"architectures": ["LiLiCorrDraftModel"], "dflash_config": nested}
    assert made.config == {**want.config, **named}
    more = lattice_shapes(2)
    for layer in range(2) if options else ():
        for name in ("attention_conv", "mlp_conv"):
            more[f"layers.{layer}.{name}.base_kernel"] = (2, 2, 24)
            more[f"layers.{layer}.{name}.kernel_projection.weight"] = (2 * 2 * 4, 24)
    shapes = {name: tuple(value.shape) for name, value in made.weights.items()}
    assert shapes == {n: tuple(w.shape) for n, w in want.weights.items()} | more
    assert {value.dtype for value in made.weights.values()} == {torch.bfloat16}


def test_engines_get_what_they_serve(kit: Any) -> None:
    tiny = kit.tiny(candidate_top_k=4)
    made = export(tiny, "sglang")
    assert made.serve == {"sglang": {"speculative_algorithm": "DFLASH"}}
    assert made.environment == {"sglang": {"SGLANG_ENABLE_LILICORR_SAMPLING": "1"}}
    assert made.config == export(tiny).config
    args = {"config": tiny.config, "draft": tiny.draft, "target": tiny.target}
    assert specforge_export(**args, format="gguf") is None


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"candidate_top_k": 4}, "vllm", "vLLM has no class"),
    ({"candidate_top_k": 6}, "sglang", r"strategy\.candidate_top_k=4"),
    ({"candidate_top_k": 4, "softcap": 9.0}, "sglang", "caps its logits at 9"),
    ({"candidate_top_k": 4, "scale": 2.0}, "sglang", "multiplies its embeddings by 2"),
    ({"candidate_top_k": 4, "bias": True}, "sglang", "without its bias"),
]


@pytest.mark.parametrize(("options", "format", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_engines_would_serve_otherwise_is_refused(
    kit: Any, options: dict[str, Any], format: str, message: str
) -> None:
    tiny = kit.tiny(**options)
    with pytest.raises(ConfigError, match=message):
        export(tiny, format)
    if format == "sglang":
        assert not export(tiny).serve


@pytest.mark.parametrize("options", [CONVOLVED, {"lattice_hidden_size": 0}], ids=str)
def test_reloading_gives_every_weight_back(kit: Any, options: dict[str, Any]) -> None:
    tiny, other = (kit.tiny(export_dtype="float32", seed=s, **options) for s in (0, 9))
    made = export(tiny)
    assert not torch.equal(export(other).weights["fc.weight"], made.weights["fc.weight"])
    assert specforge_import(other.config, other.draft, made)
    again = export(other)
    assert again.config == made.config
    assert all(torch.equal(again.weights[name], value) for name, value in made.weights.items())


def test_a_published_draft_without_our_own_fields_is_read(kit: Any) -> None:
    tiny = kit.tiny(lattice_hidden_size=0)
    made, ours = export(tiny), ("label_layout", "sample_from_anchor", "num_draft_tokens")
    nested = {k: v for k, v in made.config["dflash_config"].items() if k not in ours}
    nested |= {"lilicorr_hidden_size": 24, "conv_kernel_size": 0}
    given = replace(made, config={**made.config, "dflash_config": nested})
    assert specforge_import(tiny.config, tiny.draft, given)


def test_another_methods_export_is_left_to_it(kit: Any) -> None:
    tiny = kit.tiny()
    made = export(tiny)
    config = {**made.config, "architectures": ["DFlashDraftModel"]}
    assert not specforge_import(tiny.config, tiny.draft, replace(made, config=config))


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda c, _: c.update(lilicorr_candidate_topk=8), r"strategy\.candidate_top_k=8"),
    (lambda c, _: c.update(lilicorr_hidden_size=0), "lattice_hidden_size 0"),
    (lambda c, _: c.update(lilicorr_num_heads=4), "lattice_heads=4"),
    (lambda c, _: c.update(lilicorr_logit_scale=8.0), "logit_scale=8.0"),
    (lambda c, _: c.pop("lilicorr_vector_eps"), "does not say vector_eps, which is 0.0001"),
    (lambda c, _: c.update(conv_kernel_size=3, conv_group_size=6), "conv_kernel_size=3"),
    (lambda c, _: c.update(mask_token_id=7), "mask_token_id=7"),
    (lambda c, _: c.update(block_size=8), "block_size=8"),
    (lambda _, w: w.pop("lilicorr.out_head.bias"), "out_head.bias"),
    (lambda _, w: w.pop("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    (lambda _, w: w.update({"lilicorr.more": torch.ones(1)}), "more"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[m for _, m in CHANGES])
def test_another_draft_is_refused_and_nothing_is_loaded(
    kit: Any, change: Change, message: str
) -> None:
    made, tiny = export(kit.tiny()), kit.tiny(seed=9)
    nested, weights = dict(made.config["dflash_config"]), dict(made.weights)
    change(nested, weights)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    config = {**made.config, "dflash_config": nested}
    with pytest.raises(CheckpointError, match=message):
        specforge_import(tiny.config, tiny.draft, replace(made, config=config, weights=weights))
    assert all(torch.equal(before[name], v) for name, v in tiny.model.state_dict().items())
