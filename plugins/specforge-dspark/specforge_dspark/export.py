"""The published checkpoint layout, written for engines and read back.

Formats: `hf` (the published layout), `sglang` and `vllm` (the same files, refused where the
engine would serve something else than was trained).  Engines read `block_size` as the number of
drafted tokens, and `sample_from_anchor` as whether the known token's slot drafts one: both stand
at the top and in `dflash_config`, where different engines look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from specforge_dflash.export import (
    ARCHITECTURE as PLAIN,
    CAUSES,
    export_config,
    load_export as load_backbone,
    target_not_served,
)
from specforge_dflash.model import Frozen

from specforge_core.drafts.tensors import check_alike, check_given, readable_config
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Draft, Export, ExportFile, TargetInfo

from .confidence import Record, calibrate
from .config import DSparkConfig
from .model import DSparkModel

ARCHITECTURE = "Qwen3DSparkModel"
READ = (ARCHITECTURE, "DSparkDraftModel")
ENGINES = ("sglang", "vllm")
BACKBONE = "backbone."
STS = "sts.json"  # temperatures of the confidences, as SGLang reads them
HEADS = ("markov_head.", "confidence_head.")
TARGETS_OWN = ("embed_tokens.", "lm_head.")  # some checkpoints repeat them


def export_draft(
    config: DSparkConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return the files' contents; None for a format this package does not know."""
    model, frozen = draft.model, draft.frozen
    assert isinstance(model, DSparkModel)
    assert isinstance(frozen, Frozen)
    if format not in ("hf", *ENGINES):
        return None
    refused = {engine: _refused(config, frozen, target, engine) for engine in ENGINES}
    if reason := refused.get(format):
        raise ConfigError(reason)
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    serve: dict[str, dict[str, Any]] = {
        "sglang": {"speculative_algorithm": "DSPARK"},
        "vllm": {"method": "dspark", "num_speculative_tokens": config.num_draft_tokens},
    }
    files = {}
    if config.calibration is not None:
        record = Record.read(config.calibration, config.num_draft_tokens)
        files[STS] = calibrate(record).to_json().encode()
        serve["sglang"]["speculative_dspark_confidence_sts_path"] = ExportFile(name=STS)
    return Export(
        config=_config_json(config, model, target),
        weights={
            n.removeprefix(BACKBONE): value.detach().to(device="cpu", dtype=dtype).contiguous()
            for n, value in model.state_dict().items()
        },
        files=files,
        serve={engine: serve[engine] for engine in ENGINES if not refused[engine]},
        causes={**CAUSES, "markov_head_type": "Markov head", "markov_rank": "Markov head"},
    )


def _refused(config: DSparkConfig, frozen: Frozen, target: TargetInfo, engine: str) -> str | None:
    """Return why an engine would draft something else than was trained."""
    wanted = None
    if config.markov_head != "vanilla":
        wanted = "markov_head=vanilla"
    elif config.first_slot == 1:
        wanted = "label_layout=next_token"
    if engine == "vllm" and wanted is not None:
        return (
            f"vllm serves DSpark drafts trained with strategy.{wanted}; this one has "
            f"markov_head={config.markov_head}, label_layout={config.label_layout}. "
            "Try: --format sglang"
        )
    return target_not_served(frozen, target, engine)


def _config_json(config: DSparkConfig, model: DSparkModel, target: TargetInfo) -> dict[str, Any]:
    out = export_config(config, model.backbone.shape, target)
    out.pop("final_logit_softcapping", None)  # not applied to a draft's logits
    own = {
        "block_size": config.num_draft_tokens,
        "sample_from_anchor": config.first_slot == 0,
        "mask_token_id": model.backbone.shape.mask_token_id,
        "target_layer_ids": list(model.backbone.shape.capture_layers),
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head,
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_head and config.confidence_with_markov,
    }
    nested = {**out["dflash_config"], "projector_type": "dspark", **own}
    return {**out, **own, "architectures": [ARCHITECTURE], "dflash_config": nested}


def load_export(config: DSparkConfig, model: DSparkModel, export: Export) -> bool:
    """Load an export into `model`.  Raises CheckpointError when it was made for another draft."""
    if not set(READ) & set(export.config.get("architectures") or ()):
        return False
    weights = {n: w for n, w in export.weights.items() if not n.startswith(TARGETS_OWN)}
    heads = {name: weight for name, weight in weights.items() if name.startswith(HEADS)}
    own = {name: w for name, w in model.state_dict().items() if name.startswith(HEADS)}
    with readable_config():
        given = _backbone_config(export.config)
        _check_heads(config, _fields(export.config), heads)
    check_given(heads, own)
    rest = {name: weight for name, weight in weights.items() if name not in heads}
    backbone = replace(export, config=given, weights=rest)
    with readable_config():
        for key in ("dflash_config", "dspark_config"):
            check_alike(export.config, export.config.get(key) or {}, key)
    load_backbone(config, model.backbone, backbone)
    model.load_state_dict(heads, strict=False)
    return True


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's fields, wherever they stand: nested before at the top."""
    nested = (given.get("dflash_config") or {}) | (given.get("dspark_config") or {})
    return {**given, **nested}


def _backbone_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as the DFlash backbone's would be."""
    fields = _fields(given)
    anchored = bool(fields.get("sample_from_anchor", True))
    nested = {
        "block_size": int(fields["block_size"]) + (0 if anchored else 1),
        "mask_token_id": fields.get("mask_token_id"),
        "target_layer_ids": fields.get("target_layer_ids"),
        "label_layout": "next_token" if anchored else "same_position",
    }
    outer = {name: value for name, value in given.items() if name not in nested}
    return {**outer, "architectures": [PLAIN], "dflash_config": nested}


def _check_heads(
    config: DSparkConfig, given: Mapping[str, Any], heads: Mapping[str, torch.Tensor]
) -> None:
    confident = any(name.startswith("confidence_head.") for name in heads)
    pairs: dict[str, tuple[Any, Any]] = {
        "markov_head": (given.get("markov_head_type"), config.markov_head),
        "markov_rank": (given.get("markov_rank"), config.markov_rank),
        "confidence_head": (confident, config.confidence_head),
    }
    if confident and config.confidence_head:
        with_markov = given.get("confidence_head_with_markov", True)
        pairs["confidence_with_markov"] = (bool(with_markov), config.confidence_with_markov)
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise CheckpointError(
                f"the export has {name} {theirs}, this run {ours}. Try: strategy.{name}={theirs}"
            )
