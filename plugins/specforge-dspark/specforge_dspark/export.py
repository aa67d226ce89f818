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

from specforge_dflash.around import export_around, load_around, parts
from specforge_dflash.export import target_not_served
from specforge_dflash.model import Frozen

from specforge_core.drafts.tensors import check_alike, check_options
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, ExportFile, TargetInfo

from .confidence import Record, calibrate
from .config import DSparkConfig
from .model import DSparkModel

ARCHITECTURE = "Qwen3DSparkModel"
READ = (ARCHITECTURE, "DSparkDraftModel")
STS = "sts.json"  # temperatures of the confidences, as SGLang reads them
TARGETS_OWN = ("embed_tokens.", "lm_head.")  # some checkpoints repeat them


@hookimpl
def specforge_export(
    config: DSparkConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf, sglang, vllm."""
    model, frozen = parts(draft, DSparkModel)
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
    sglang: dict[str, Any] = {"speculative_algorithm": "DSPARK"}
    vllm = {"method": "dspark", "num_speculative_tokens": config.num_draft_tokens}
    files = {}
    if config.calibration is not None:
        record = Record.read(config.calibration, config.num_draft_tokens)
        files[STS] = calibrate(record).to_json().encode()
        sglang["speculative_dspark_confidence_sts_path"] = ExportFile(name=STS)
    made = export_around(
        config,
        model,
        target,
        format,
        architecture=ARCHITECTURE,
        own={**own, "projector_type": "dspark"},
        serve={"sglang": sglang, "vllm": vllm},
        refused={engine: _refused(config, frozen, target, engine) for engine in ("sglang", "vllm")},
        causes=dict.fromkeys(("markov_head_type", "markov_rank"), "Markov head"),
    )
    if made is None:
        return None
    # engines apply no soft cap to a draft's logits
    outer = {n: v for n, v in made.config.items() if n != "final_logit_softcapping"}
    return replace(made, config={**outer, **own}, files=files)


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


@hookimpl
def specforge_import(config: DSparkConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, DSparkModel), export.config
    if not set(READ) & set(given.get("architectures") or ()):
        return False
    weights = {n: w for n, w in export.weights.items() if not n.startswith(TARGETS_OWN)}
    layout, fields = _backbone_config(given), _fields(given)
    confident = any(name.startswith("confidence_head.") for name in weights)
    markov = bool(fields.get("confidence_head_with_markov", True))
    both = confident and config.confidence_head
    ours = config.confidence_with_markov
    check_options(
        {
            "markov_head": (fields.get("markov_head_type"), config.markov_head),
            "markov_rank": (fields.get("markov_rank"), config.markov_rank),
            "confidence_head": (confident, config.confidence_head),
            "confidence_with_markov": (markov if both else ours, ours),
        }
    )
    for key in ("dflash_config", "dspark_config"):
        check_alike(given, given.get(key) or {}, key)
    load_around(config, model, replace(export, weights=weights), layout)
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
    return {**outer, "dflash_config": nested}
