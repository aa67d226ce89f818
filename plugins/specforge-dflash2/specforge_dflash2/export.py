"""The published checkpoint layout, written for engines and read back.

It is DFlash's under another architecture, with convolutions in the layers and a selector.
"""

from __future__ import annotations

from typing import Any

from specforge_dflash.around import export_around, load_around
from specforge_dflash.export import serving_options
from specforge_dflash.model import parts

from specforge_core.drafts.tensors import check_options
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, TargetInfo

from .config import ConvolvedConfig, DFlash2Config
from .model import DFlash2Model

ARCHITECTURE = "DFlash2DraftModel"
# key of dflash_config -> what goes wrong where it differs
CAUSES = {
    **dict.fromkeys(("conv_kernel_size", "conv_group_size"), "convolutions"),
    **dict.fromkeys(("selector_rank", "selector_top_k"), "candidate selector"),
    **dict.fromkeys(("output_multiplier", "final_logit_softcapping"), "scale of the logits"),
}
SOFTCAP = "final_logit_softcapping"  # nested in this layout
OPTIONS = {name: name for name in CAUSES if name != SOFTCAP}


@hookimpl
def specforge_export(
    config: DFlash2Config, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf, sglang, vllm."""
    cap = parts(draft, DFlash2Model)[1].softcap
    return export_around(
        config,
        draft,
        target,
        format,
        architecture=ARCHITECTURE,
        options=OPTIONS,
        own={} if cap is None else {SOFTCAP: cap},
        serve=serving_options(config),
        refused={"sglang": not_walked(config, "selector_top_k")},
        causes=CAUSES,
        environment={"vllm": {"VLLM_USE_V2_MODEL_RUNNER": "1"}},  # the first has no selector
    )


def not_walked(config: ConvolvedConfig, name: str, most: int | None = None) -> str | None:
    """Return why SGLang does not walk over as many candidates of a slot as the option `name`."""
    top_k: int = getattr(config, name)
    fits = min(1 << (top_k.bit_length() - 1), most or top_k)
    if top_k == fits:
        return None
    return (
        f"SGLang walks over 2, 4, 8{', ...' if most is None else f' or {most}'} candidates of a "
        f"slot, and this draft was trained with {name} {top_k}. Try: --format hf, or train with "
        f"strategy.{name}={fits}"
    )


@hookimpl
def specforge_import(config: DFlash2Config, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, DFlash2Model), export.config
    if ARCHITECTURE not in (given.get("architectures") or ()):
        return False
    softcap = model.backbone.shape.softcap
    nested: dict[str, Any] = dict(given.get("dflash_config") or {})
    cap = nested.pop(SOFTCAP, None) or None  # 0 is none too
    check_options({}, {SOFTCAP: (cap, softcap)})
    nested.setdefault("output_multiplier", 1.0)  # what engines take for what is absent
    layout = {**given, SOFTCAP: softcap, "dflash_config": nested}
    load_around(config, model, export, layout, OPTIONS)
    return True
