"""The published layout key by key, and every mismatch that would load and then fail silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_domino import specforge_export, specforge_import

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export


def export(tiny: Any, format: str = "hf") -> Export:
    made: Export | None = specforge_export(tiny.config, tiny.draft, tiny.target, format)
    assert made is not None
    return made


def test_config_has_what_engines_read(kit: Any) -> None:
    made = export(kit.tiny(), "sglang")
    assert made.config["architectures"] == ["DFlashDraftModel"]
    assert made.config["emb_dim"] == 6
    assert made.config["block_size"] == 5
    assert made.config["dflash_config"] == {
        "block_size": 5,
        "mask_token_id": 40,
        "target_layer_ids": [1, 5],
        "label_layout": "next_token",
        "sample_from_anchor": True,
        "num_draft_tokens": 4,  # not the number of slots
        "projector_type": "domino",
        "shift_label": True,
        "gru_hidden_dim": 7,
        "emb_dim": 6,
        "pure_draft_prefix_len": 1,
    }
    json.dumps(made.config)
    unshifted = export(kit.tiny(label_layout="same_position"), "sglang").config
    assert unshifted["dflash_config"]["shift_label"] is False
    assert made.serve["sglang"]["speculative_algorithm"] == "DFLASH"


def test_tensors_are_the_published_ones(kit: Any) -> None:
    weights = export(kit.tiny()).weights
    own = {n: tuple(w.shape) for n, w in weights.items() if not n.startswith("layers.")}
    assert own == {
        "fc.weight": (24, 48),
        "hidden_norm.weight": (24,),
        "norm.weight": (24,),
        "prefix_gru.weight_ih_l0": (21, 24),
        "prefix_gru.weight_hh_l0": (21, 7),
        "embed_proj.0.weight": (6, 31),
        "embed_proj.2.weight": (41, 6),
    }
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ["DFlashDraftModel", "DominoDraftModel"])
def test_a_published_checkpoint_is_read_back(kit: Any, architecture: str) -> None:
    """One without the keys that only this package writes."""
    tiny = kit.tiny(export_dtype="float32")
    made = export(tiny)
    nested = dict(made.config["dflash_config"])
    for name in ("label_layout", "sample_from_anchor", "num_draft_tokens"):
        del nested[name]
    config = {**made.config, "architectures": [architecture], "dflash_config": nested}
    other = kit.tiny(export_dtype="float32", seed=9)
    assert specforge_import(other.config, other.draft, replace(made, config=config))
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"pure_draft_prefix_len": 2}, "sglang", "pure_draft_prefix_len 2"),
        ({"scale": 3.0, "model_type": "gemma"}, "sglang", "embeddings by 3, .* of gemma without"),
        ({"bias": True}, "sglang", "head without its bias"),
        ({}, "vllm", "vLLM does not correct the logits"),
    ],
)
def test_what_an_engine_would_serve_otherwise_is_refused(
    kit: Any, options: dict[str, Any], format: str, message: str
) -> None:
    tiny = kit.tiny(**options)
    with pytest.raises(ConfigError, match=message):
        export(tiny, format)
    assert not export(tiny, "hf").serve.get(format)


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text"])
def test_targets_whose_embedding_scales_itself_are_served(kit: Any, kind: str) -> None:
    assert export(kit.tiny(scale=3.0, model_type=kind), "sglang").serve["sglang"]


def test_an_unknown_format_is_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    assert specforge_export(tiny.config, tiny.draft, tiny.target, "other") is None


def nested(**changes: Any) -> Callable[[Export], Export]:
    def change(made: Export) -> Export:
        found = {**made.config["dflash_config"], **changes}
        return replace(made, config={**made.config, "dflash_config": found})

    return change


def without(*names: str) -> Callable[[Export], Export]:
    return lambda made: replace(
        made, weights={n: w for n, w in made.weights.items() if n not in names}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nested(shift_label=False), "strategy.label_layout=same_position"),
        (nested(shift_label=None), "shift_label None"),
        (nested(shift_label="true"), "shift_label 'true'"),
        (nested(pure_draft_prefix_len=2), "strategy.pure_draft_prefix_len=2"),
        (nested(gru_hidden_dim=8), "strategy.gru_hidden_dim=8"),
        (nested(emb_dim=8), "strategy.emb_dim=8"),
        (nested(target_layer_ids=[2, 6]), "layers"),
        (nested(mask_token_id=7), "mask_token_id"),
        (nested(block_size=4), "block_size"),
        (lambda made: replace(made, config={**made.config, "emb_dim": 5}), "emb_dim 5, this run 6"),
        (without("prefix_gru.weight_hh_l0"), "prefix_gru.weight_hh_l0"),
        (without("embed_proj.2.weight"), "embed_proj.2.weight"),
        (without("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
        (lambda m: replace(m, weights={**m.weights, "more": torch.ones(1)}), "more"),
    ],
)
def test_a_draft_made_for_another_run_is_refused_and_nothing_is_loaded(
    kit: Any, change: Callable[[Export], Export], message: str
) -> None:
    tiny, other = kit.tiny(), kit.tiny(seed=9)
    before = {name: w.clone() for name, w in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        specforge_import(other.config, other.draft, change(export(tiny)))
    assert all(torch.equal(w, before[n]) for n, w in other.model.state_dict().items())


def test_drafts_without_a_correction_are_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    assert not specforge_import(tiny.config, tiny.draft, nested(projector_type=None)(export(tiny)))


def test_a_dflash_run_refuses_a_domino_draft(kit: Any) -> None:
    from specforge_dflash.export import load_export

    tiny = kit.tiny()
    with pytest.raises(CheckpointError, match=r"embed_proj\.0\.weight"):
        load_export(tiny.config, tiny.model.backbone, export(tiny))
