"""The published checkpoint layout, written for engines and read back.

It is DFlash's under another architecture, but engines read `block_size` as the number of drafted
tokens, and `sample_from_anchor` as whether the known token's slot drafts one: both stand at the
top and in `dflash_config`, where different engines look.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from specforge_dflash.around import export_around, load_around
from specforge_dflash.model import parts

from specforge_core.drafts.tensors import check_alike
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, ExportFile, TargetInfo

from .confidence import calibrate, read
from .config import DSparkConfig
from .model import DSparkModel

ARCHITECTURE = "Qwen3DSparkModel"
READ = (ARCHITECTURE, "DSparkDraftModel")
# option -> its key in config.json
OPTIONS = {
    "markov_head": "markov_head_type",
    "markov_rank": "markov_rank",
    "confidence_head": "enable_confidence_head",
    "confidence_with_markov": "confidence_head_with_markov",
}
NESTED = ("label_layout", "num_draft_tokens", "projector_type")  # not at the top of config.json
STS = "sts.json"  # temperatures of the confidences, as SGLang reads them
TARGETS_OWN = ("embed_tokens.", "lm_head.")  # some checkpoints repeat them


@hookimpl
def specforge_export(
    config: DSparkConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf, sglang, vllm."""
    tokens = config.num_draft_tokens
    sglang: dict[str, Any] = {"speculative_algorithm": "DSPARK"}
    files, environment = {}, {}
    if config.calibration is not None:
        fitted = calibrate(*read(config.calibration, tokens))
        files[STS] = json.dumps(asdict(fitted), indent=2).encode()
        sglang["speculative_dspark_confidence_sts_path"] = ExportFile(name=STS)
        environment = {"sglang": {"SGLANG_RAGGED_VERIFY_MODE": "compact"}}  # else it reads none
    made = export_around(
        config,
        draft,
        target,
        format,
        architecture=ARCHITECTURE,
        options=OPTIONS,
        own={
            "block_size": tokens,
            "confidence_head_with_markov": config.confidence_head and config.confidence_with_markov,
            "projector_type": "dspark",
        },
        serve={"sglang": sglang, "vllm": {"method": "dspark", "num_speculative_tokens": tokens}},
        refused={"vllm": _not_in_vllm(config)},
        causes=dict.fromkeys(("markov_head_type", "markov_rank"), "Markov head"),
    )
    if made is None:
        return None
    top = {n: v for n, v in made.config["dflash_config"].items() if n not in NESTED}
    # engines apply no soft cap to a draft's logits
    outer = {n: v for n, v in made.config.items() if n != "final_logit_softcapping"}
    return replace(made, config={**outer, **top}, files=files, environment=environment)


def _not_in_vllm(config: DSparkConfig) -> str | None:
    """Return why vLLM would draft something else than was trained."""
    if config.markov_head == "vanilla" and config.label_layout == "next_token":
        return None
    return (
        "vllm serves DSpark drafts trained with strategy.markov_head=vanilla and "
        f"strategy.label_layout=next_token; this one has markov_head={config.markov_head}, "
        f"label_layout={config.label_layout}. Try: --format sglang"
    )


@hookimpl
def specforge_import(config: DSparkConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, DSparkModel), export.config
    if not set(READ) & set(given.get("architectures") or ()):
        return False
    weights = {n: w for n, w in export.weights.items() if not n.startswith(TARGETS_OWN)}
    sections = {key: given.get(key) or {} for key in ("dflash_config", "dspark_config")}
    for key, section in sections.items():
        check_alike(given, section, key)
    said = {**given, **sections["dflash_config"], **sections["dspark_config"]}
    for name in ("architectures", *sections):  # else all is said in both places alike
        said.pop(name, None)
    confident = any(name.startswith("confidence_head.") for name in weights)
    with_markov = bool(said.get("confidence_head_with_markov", True))
    anchored = bool(said.get("sample_from_anchor", True))
    said |= {  # a block's slots as DFlash counts them
        "enable_confidence_head": confident,
        "confidence_head_with_markov": with_markov if confident else config.confidence_with_markov,
        "block_size": int(said["block_size"]) + (0 if anchored else 1),
        "label_layout": "next_token" if anchored else "same_position",
    }
    layout = {**said, "dflash_config": said}
    load_around(config, model, replace(export, weights=weights), layout, OPTIONS)
    return True
