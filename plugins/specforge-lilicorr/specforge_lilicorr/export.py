"""The published checkpoint layout, written for engines and read back.

It is DFlash's under another architecture, with the lattice's tensors and options, and DFlash 2's
convolutions where the draft has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import specforge_dflash
import torch
from specforge_dflash.export import ARCHITECTURE as PLAIN, load_export as load_backbone

from specforge_core.drafts.tensors import check_given, readable_config
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Draft, Export, TargetInfo

from .config import LiLiCorrConfig
from .model import LiLiCorrModel, Target

ARCHITECTURE = "LiLiCorrDraftModel"
LATTICE = "lilicorr."
MOST_CANDIDATES = 16  # of a slot, that SGLang's kernel walks over
# option -> its key in dflash_config; no engine has a default for them
OPTIONS = {
    "candidate_top_k": "lilicorr_candidate_topk",
    "lattice_hidden_size": "lilicorr_hidden_size",
    "lattice_layers": "lilicorr_num_layers",
    "lattice_heads": "lilicorr_num_heads",
    "lattice_mlp_ratio": "lilicorr_mlp_ratio",
    "factor_dim": "lilicorr_factor_dim",
    "vector_eps": "lilicorr_vector_eps",
    "logit_scale": "lilicorr_logit_scale",
}
CONVOLUTIONS = ("conv_kernel_size", "conv_group_size")  # absent without them
CAUSES = {
    **dict.fromkeys(("lilicorr_enabled", *OPTIONS.values()), "lattice"),
    **dict.fromkeys(CONVOLUTIONS, "convolutions"),
}


def export_draft(
    config: LiLiCorrConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return the files' contents; None for a format this package does not know."""
    model, frozen = draft.model, draft.frozen
    assert isinstance(model, LiLiCorrModel)
    assert isinstance(frozen, Target)
    reasons = {name: _not_served(config, frozen, target, name) for name in ("sglang", "vllm")}
    if reason := reasons.get(format):
        raise ConfigError(reason)
    plain: Export | None = specforge_dflash.specforge_export(
        config=config, draft=replace(draft, model=model.backbone), target=target, format=format
    )
    if plain is None:
        return None
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    lattice = {
        LATTICE + name: value.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, value in model.lilicorr.state_dict().items()
    }
    own = {key: getattr(config, name) for name, key in OPTIONS.items()}
    own |= {name: getattr(config, name) for name in CONVOLUTIONS if config.conv_kernel_size}
    nested = {**plain.config["dflash_config"], "lilicorr_enabled": True, **own}
    return replace(
        plain,
        config={**plain.config, "architectures": [ARCHITECTURE], "dflash_config": nested},
        weights={**plain.weights, **lattice},
        serve={engine: how for engine, how in plain.serve.items() if not reasons[engine]},
        causes={**plain.causes, **CAUSES},
    )


def _not_served(
    config: LiLiCorrConfig, frozen: Target, target: TargetInfo, engine: str
) -> str | None:
    """Return why an engine would draft something else than was trained."""
    if engine == "vllm":
        return "vLLM has no class for LiLiCorr drafts. Try: --format sglang"
    top_k = config.candidate_top_k
    if top_k > MOST_CANDIDATES or top_k.bit_count() != 1:
        fits = min(1 << (top_k.bit_length() - 1), MOST_CANDIDATES)
        return (
            f"SGLang walks over 2, 4, 8 or {MOST_CANDIDATES} candidates of a slot, and this draft "
            f"was trained with candidate_top_k {top_k}. Try: --format hf, or train with "
            f"strategy.candidate_top_k={fits}"
        )
    does = None
    if frozen.scale != 1.0:
        does = f"multiplies its embeddings by {frozen.scale:g}"
    elif frozen.softcap is not None:
        does = f"caps its logits at {frozen.softcap:g}"
    if does is not None:
        return (
            f"target {target.name_or_path!r} {does}, and SGLang's candidates are described without "
            "that: other tokens would be picked than in training. Try: --format hf"
        )
    return None


def load_export(config: LiLiCorrConfig, model: LiLiCorrModel, export: Export) -> bool:
    """Load an export into `model`.  Raises CheckpointError when it was made for another draft."""
    if ARCHITECTURE not in (export.config.get("architectures") or ()):
        return False
    with readable_config():
        _check(config, model, export.config)
    lattice = {
        name.removeprefix(LATTICE): value
        for name, value in export.weights.items()
        if name.startswith(LATTICE)
    }
    check_given(lattice, model.lilicorr.state_dict())
    rest = {name: x for name, x in export.weights.items() if not name.startswith(LATTICE)}
    plain = {**export.config, "architectures": [PLAIN]}
    load_backbone(config, model.backbone, replace(export, config=plain, weights=rest))
    model.lilicorr.load_state_dict(lattice)
    return True


def _check(config: LiLiCorrConfig, model: LiLiCorrModel, given: Mapping[str, Any]) -> None:
    """Compare what would load without an error and then draft something else."""
    nested: Mapping[str, Any] = given.get("dflash_config") or {}
    theirs = {name: nested.get(key) for name, key in OPTIONS.items()}
    theirs |= {name: nested.get(name) or 0 for name in CONVOLUTIONS}
    width = model.backbone.shape.hidden_size
    for name, value in theirs.items():
        ours = getattr(config, name)
        same = value == ours
        if name == "lattice_hidden_size":  # 0 is the draft's width
            same = value is not None and (value or width) == (ours or width)
        if not same:
            raise CheckpointError(
                f"the export has {name} {value}, this run {ours}. Try: strategy.{name}={value}"
            )
