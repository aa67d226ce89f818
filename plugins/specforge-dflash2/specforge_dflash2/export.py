"""The published checkpoint layout, written for engines and read back.

It is DFlash's under another architecture, with convolutions in the layers and a selector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from specforge_dflash.export import ARCHITECTURE as PLAIN, load_export as load_backbone
from torch import nn

from specforge_core.drafts.tensors import check_given, readable_config
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export

from .config import DFlash2Config
from .model import DFlash2Model

ARCHITECTURE = "DFlash2DraftModel"
SELECTOR = "candidate_selector."
# key of dflash_config -> what goes wrong where it differs
CAUSES = {
    **dict.fromkeys(("conv_kernel_size", "conv_group_size"), "convolutions"),
    **dict.fromkeys(("selector_rank", "selector_top_k"), "candidate selector"),
    **dict.fromkeys(("output_multiplier", "final_logit_softcapping"), "scale of the logits"),
}


def extend_export(config: DFlash2Config, model: nn.Module, plain: Export, format: str) -> Export:
    """Return the export of the draft's backbone with all that this method adds to it."""
    assert isinstance(model, DFlash2Model)
    walks = config.selector_top_k.bit_count() == 1
    if format == "sglang" and not walks:
        raise ConfigError(
            f"SGLang walks over 2, 4, 8, ... candidates of a slot, and this draft was trained with "
            f"selector_top_k {config.selector_top_k}. Try: --format hf, or train with "
            f"strategy.selector_top_k={1 << (config.selector_top_k.bit_length() - 1)}"
        )
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    selector = {
        SELECTOR + name: value.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, value in model.candidate_selector.state_dict().items()
    }
    nested = {**plain.config["dflash_config"], **_own(config, model.backbone.shape.softcap)}
    return replace(
        plain,
        config={**plain.config, "architectures": [ARCHITECTURE], "dflash_config": nested},
        weights={**plain.weights, **selector},
        serve={e: options for e, options in plain.serve.items() if walks or e != "sglang"},
        causes={**plain.causes, **CAUSES},
    )


def load_export(config: DFlash2Config, model: nn.Module, export: Export) -> bool:
    """Load an export into `model`.  Raises CheckpointError when it was made for another draft."""
    assert isinstance(model, DFlash2Model)
    if ARCHITECTURE not in (export.config.get("architectures") or ()):
        return False
    softcap = model.backbone.shape.softcap
    with readable_config():
        _check(config, softcap, export.config)
    selector = {
        name.removeprefix(SELECTOR): value
        for name, value in export.weights.items()
        if name.startswith(SELECTOR)
    }
    check_given(selector, model.candidate_selector.state_dict())
    rest = {k: v for k, v in export.weights.items() if not k.startswith(SELECTOR)}
    # the soft cap is nested in this layout, and was compared above
    nested = dict(export.config.get("dflash_config") or {})
    nested.pop("final_logit_softcapping", None)
    own = {"final_logit_softcapping": softcap, "dflash_config": nested}
    shown = {**export.config, "architectures": [PLAIN], **own}
    load_backbone(config, model.backbone, replace(export, config=shown, weights=rest))
    model.candidate_selector.load_state_dict(selector)
    return True


def _own(config: DFlash2Config, softcap: float | None) -> dict[str, Any]:
    """Return what `dflash_config` says of this method alone."""
    found: dict[str, Any] = {
        "conv_kernel_size": config.conv_kernel_size,
        "conv_group_size": config.conv_group_size,
        "selector_rank": config.selector_rank,
        "selector_top_k": config.selector_top_k,
        "output_multiplier": config.output_multiplier,
    }
    return found if softcap is None else found | {"final_logit_softcapping": softcap}


def _check(config: DFlash2Config, softcap: float | None, given: Mapping[str, Any]) -> None:
    """Compare what would load without an error and then be accepted nowhere."""
    nested: Mapping[str, Any] = given.get("dflash_config") or {}
    absent = {"output_multiplier": 1.0}  # what engines take for it
    for name, ours in _own(config, None).items():
        theirs = nested.get(name, absent.get(name))
        if theirs != ours:
            raise CheckpointError(
                f"the export has {name} {theirs}, this run {ours}. Try: strategy.{name}={theirs}"
            )
    theirs = nested.get("final_logit_softcapping") or None  # 0 is none too
    if theirs != softcap:
        raise CheckpointError(
            f"the export has final_logit_softcapping {theirs}, this run's target {softcap}. "
            "Try the target it was trained for: target.path"
        )
