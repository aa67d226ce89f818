"""The published layout key by key, and every mismatch that would load and then fail silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_dspark import specforge_export, specforge_import

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export, ExportFile


def export(tiny: Any, format: str = "hf") -> Export:
    made: Export | None = specforge_export(tiny.config, tiny.draft, tiny.target, format)
    assert made is not None
    return made


@pytest.mark.parametrize(("layout", "drafts"), [("next_token", 4), ("same_position", 3)])
def test_config_has_what_engines_read_wherever_they_look(
    kit: Any, layout: str, drafts: int
) -> None:
    tiny = kit.tiny(label_layout=layout, markov_head="gated", softcap=9.0)
    made = export(tiny, "sglang").config
    own = {
        "block_size": drafts,  # drafted tokens, whatever the slots
        "sample_from_anchor": layout == "next_token",
        "mask_token_id": 40,
        "target_layer_ids": [1, 5],
        "markov_rank": 6,
        "markov_head_type": "gated",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    assert made["architectures"] == ["Qwen3DSparkModel"]
    assert {name: made[name] for name in own} == own
    beside = {"label_layout": layout, "num_draft_tokens": drafts, "projector_type": "dspark"}
    assert made["dflash_config"] == own | beside
    assert "final_logit_softcapping" not in made
    json.dumps(made)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vanilla", {}),
        ("gated", {"gate_proj.weight": (6, 30), "gate_proj.bias": (6,)}),
        ("rnn", {"joint_proj.weight": (18, 36), "joint_proj.bias": (18,)}),
    ],
)
def test_tensors_are_the_published_ones(kit: Any, kind: str, more: dict[str, Any]) -> None:
    weights = export(kit.tiny(markov_head=kind)).weights
    own = {n: tuple(w.shape) for n, w in weights.items() if not n.startswith("layers.")}
    assert own == {
        "fc.weight": (24, 48),
        "hidden_norm.weight": (24,),
        "norm.weight": (24,),
        "markov_head.markov_w1.weight": (41, 6),
        "markov_head.markov_w2.weight": (41, 6),
        "confidence_head.proj.weight": (1, 30),
        "confidence_head.proj.bias": (1,),
        **{f"markov_head.{name}": shape for name, shape in more.items()},
    }
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def at_the_top(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "dflash_config"}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    inner = config["dflash_config"]
    outer = {n: v for n, v in config.items() if n not in inner}
    return {**outer, "dspark_config": inner, "dflash_config": None}


@pytest.mark.parametrize("layout", ["next_token", "same_position"])
@pytest.mark.parametrize("place", [at_the_top, nested])
@pytest.mark.parametrize("architecture", ["Qwen3DSparkModel", "DSparkDraftModel"])
def test_a_published_checkpoint_is_read_back(
    kit: Any, layout: str, place: Callable[[dict[str, Any]], dict[str, Any]], architecture: str
) -> None:
    options = {"label_layout": layout, "export_dtype": "float32", "markov_head": "rnn"}
    tiny, other = kit.tiny(**options), kit.tiny(**options, seed=9)
    made = export(tiny)
    copies = {n: torch.ones(41, 24) for n in ("embed_tokens.weight", "lm_head.weight")}
    config = place({**made.config, "architectures": [architecture]})
    given = replace(made, config=config, weights={**made.weights, **copies})
    assert specforge_import(other.config, other.draft, given)
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"markov_head": "rnn"}, "vllm", "markov_head=vanilla"),
        ({"label_layout": "same_position"}, "vllm", "label_layout=next_token"),
        ({"bias": True}, "sglang", "head without its bias"),
        ({"bias": True}, "vllm", "head without its bias"),
        ({"scale": 3.0, "model_type": "gemma"}, "sglang", "embeddings by 3"),
    ],
)
def test_what_an_engine_would_serve_otherwise_is_refused(
    kit: Any, options: dict[str, Any], format: str, message: str
) -> None:
    tiny = kit.tiny(**options)
    with pytest.raises(ConfigError, match=message):
        export(tiny, format)
    assert not export(tiny, "hf").serve.get(format)


def test_what_engines_are_started_with(kit: Any, tmp_path: Path) -> None:
    tiny = kit.tiny()
    made = export(tiny)
    assert made.serve == {
        "sglang": {"speculative_algorithm": "DSPARK"},
        "vllm": {"method": "dspark", "num_speculative_tokens": 4},
    }
    assert not made.files
    assert not made.environment
    assert specforge_export(tiny.config, tiny.draft, tiny.target, "other") is None
    record = tmp_path / "record.jsonl"
    rows = [{"logits": [2.0, 1.0, 0.5, 0.1], "accepted": n} for n in (0, 2, 4)]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrated = export(kit.tiny(calibration=record), "sglang")
    told = json.loads(calibrated.files["sts.json"])
    assert len(told["temperatures"]) == len(told["ece_before"]) == len(told["ece_after"]) == 4
    assert told["num_samples"] == 3
    path = calibrated.serve["sglang"]["speculative_dspark_confidence_sts_path"]
    assert path == ExportFile(name="sts.json")
    assert calibrated.environment == {"sglang": {"SGLANG_RAGGED_VERIFY_MODE": "compact"}}


def said(**changes: Any) -> Callable[[Export], Export]:
    def change(made: Export) -> Export:
        found = {**made.config["dflash_config"], **changes}
        both = {**made.config, **changes}  # where another engine looks
        return replace(made, config={**both, "dflash_config": found})

    return change


def without(name: str) -> Callable[[Export], Export]:
    return lambda made: replace(made, weights={n: w for n, w in made.weights.items() if n != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (said(sample_from_anchor=False), "block_size 5"),
        (said(sample_from_anchor=False, block_size=3), "label_layout=same_position"),
        (said(block_size=5), "block_size=5"),
        (said(mask_token_id=7), "mask_token_id=7"),
        (
            lambda m: replace(m, config={**m.config, "mask_token_id": 7}),
            "says mask_token_id 7, and in dflash_config 40",
        ),
        (said(target_layer_ids=[2, 6]), "layers"),
        (said(markov_head_type="rnn"), "markov_head=rnn"),
        (said(markov_rank=8), "markov_rank=8"),
        (said(confidence_head_with_markov=False), "confidence_with_markov=False"),
        (without("confidence_head.proj.bias"), r"confidence_head\.proj\.bias"),
        (without("markov_head.markov_w2.weight"), r"markov_w2\.weight"),
        (without("layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight"),
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


def test_other_drafts_are_not_ours(kit: Any) -> None:
    tiny = kit.tiny()
    made = replace(export(tiny), config={"architectures": ["DFlashDraftModel"]})
    assert not specforge_import(tiny.config, tiny.draft, made)
