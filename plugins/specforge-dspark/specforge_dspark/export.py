"""The published checkpoint layout, written for engines and read back.

Formats: `hf` (the published layout), `sglang` and `vllm` (the same files, refused where the
engine would serve something else than was trained).  Engines read `block_size` as the number of
drafted tokens, and `sample_from_anchor` as whether the known token's slot drafts one: both stand
at the top and in `dflash_config`, where different engines look.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from specforge_dflash.around import export_around, load_around
from specforge_dflash.model import parts

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
    shape = parts(draft, DSparkModel)[0].backbone.shape
    own = {
        "block_size": config.num_draft_tokens,
        "sample_from_anchor": config.first_slot == 0,
        "mask_token_id": shape.mask_token_id,
        "target_layer_ids": list(shape.capture_layers),
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
        files[STS] = json.dumps(asdict(calibrate(record)), indent=2).encode()
        sglang["speculative_dspark_confidence_sts_path"] = ExportFile(name=STS)
    made = export_around(
        config,
        draft,
        target,
        format,
        architecture=ARCHITECTURE,
        own={**own, "projector_type": "dspark"},
        serve={"sglang": sglang, "vllm": vllm},
        refused={"vllm": _not_in_vllm(config)},
        causes=dict.fromkeys(("markov_head_type", "markov_rank"), "Markov head"),
    )
    if made is None:
        return None
    # engines apply no soft cap to a draft's logits
    outer = {n: v for n, v in made.config.items() if n != "final_logit_softcapping"}
    return replace(made, config={**outer, **own}, files=files)


def _not_in_vllm(config: DSparkConfig) -> str | None:
    """Return why vLLM would draft something else than was trained."""
    if config.markov_head != "vanilla":
        wanted = "markov_head=vanilla"
    elif config.first_slot == 1:
        wanted = "label_layout=next_token"
    else:
        return None
    return (
        f"vllm serves DSpark drafts trained with strategy.{wanted}; this one has "
        f"markov_head={config.markov_head}, label_layout={config.label_layout}. "
        "Try: --format sglang"
    )


@hookimpl
def specforge_import(config: DSparkConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, DSparkModel), export.config
    if not set(READ) & set(given.get("architectures") or ()):
        return False
    weights = {n: w for n, w in export.weights.items() if not n.startswith(TARGETS_OWN)}
    sections = {key: given.get(key) or {} for key in ("dflash_config", "dspark_config")}
    fields = {**given, **sections["dflash_config"], **sections["dspark_config"]}
    confident = any(name.startswith("confidence_head.") for name in weights)
    pairs = {
        "markov_head": (fields.get("markov_head_type"), config.markov_head),
        "markov_rank": (fields.get("markov_rank"), config.markov_rank),
        "confidence_head": (confident, config.confidence_head),
    }
    if confident:
        markov = bool(fields.get("confidence_head_with_markov", True))
        pairs["confidence_with_markov"] = (markov, config.confidence_with_markov)
    check_options(pairs)
    for key, section in sections.items():
        check_alike(given, section, key)
    anchored = bool(fields.get("sample_from_anchor", True))
    nested = {  # of config.json as DFlash would write it
        "block_size": int(fields["block_size"]) + (0 if anchored else 1),
        "mask_token_id": fields.get("mask_token_id"),
        "target_layer_ids": fields.get("target_layer_ids"),
        "label_layout": "next_token" if anchored else "same_position",
    }
    layout = {n: v for n, v in given.items() if n not in nested} | {"dflash_config": nested}
    load_around(config, model, replace(export, weights=weights), layout)
    return True
