"""The published checkpoint layout, written for engines and read back.

It is DFlash's, with the correction's tensors and their sizes in `dflash_config`.  Formats: `hf`
(the published layout) and `sglang` (the same files, refused where it would serve something else).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specforge_dflash.export import CAUSES, export_config, load_export, target_not_served
from specforge_dflash.model import Frozen

from specforge_core.drafts.tensors import check_given, check_options, readable_config, written
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Draft, Export, TargetInfo

from .config import DominoConfig
from .model import DominoModel

ARCHITECTURES = ("DFlashDraftModel", "DominoDraftModel")  # what engines load, and another spelling
BACKBONE = "backbone."
OPTIONS = ("gru_hidden_dim", "emb_dim", "pure_draft_prefix_len")
# key of config.json -> what goes wrong where it differs, for the correction's own keys
OWN_CAUSES = {
    "shift_label": "label layout",
    **dict.fromkeys(("projector_type", *OPTIONS), "logit correction"),
}
# all tokens, as trained; by itself SGLang corrects the 2048 that the backbone likes best
SGLANG = {"speculative_algorithm": "DFLASH", "speculative_domino_candidate_pool_size": 0}


def export_draft(
    config: DominoConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return the files' contents; None for a format this package does not know."""
    model, frozen = draft.model, draft.frozen
    assert isinstance(model, DominoModel)
    assert isinstance(frozen, Frozen)
    if format not in ("hf", "sglang", "vllm"):
        return None
    if format != "hf" and (reason := _not_served(config, frozen, target, format)):
        raise ConfigError(reason)
    out = export_config(config, model.backbone.shape, target)
    out["dflash_config"] |= {name: getattr(config, name) for name in OPTIONS}
    shifted = config.label_layout == "next_token"
    weights = {n.removeprefix(BACKBONE): value for n, value in model.state_dict().items()}
    out["dflash_config"] |= {"projector_type": "domino", "shift_label": shifted}
    return Export(
        config=out | {"emb_dim": config.emb_dim},  # read from either place, and must agree
        weights=written(weights, config.export_dtype),
        serve={} if _not_served(config, frozen, target, "sglang") else {"sglang": SGLANG},
        causes={**CAUSES, **OWN_CAUSES},
    )


def _not_served(
    config: DominoConfig, frozen: Frozen, target: TargetInfo, engine: str
) -> str | None:
    """Return why an engine would draft something else than was trained."""
    if engine == "vllm":
        return (
            "vLLM does not correct the logits of a block, and would draft without this draft's "
            "correction. Try: --format sglang"
        )
    if config.pure_draft_prefix_len != 1:
        return (
            f"SGLang leaves one drafted token uncorrected, and this draft was trained with "
            f"pure_draft_prefix_len {config.pure_draft_prefix_len}. Try: --format hf, or train "
            "with strategy.pure_draft_prefix_len=1"
        )
    return target_not_served(frozen, target, engine)


def load_draft(config: DominoConfig, draft: Draft, export: Export) -> bool:
    """Load an export into `draft`.  Raises CheckpointError when it was made for another one."""
    model = draft.model
    assert isinstance(model, DominoModel)
    nested = export.config.get("dflash_config")
    names = export.config.get("architectures") or ()
    if not isinstance(nested, Mapping) or not any(name in names for name in ARCHITECTURES):
        return False
    said = {**export.config, **nested}  # engines read either place
    if said.get("projector_type") != "domino":
        return False
    with readable_config():
        _check(config, said, export.config)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(BACKBONE)}
    given = {n: t for n, t in export.weights.items() if n in own}
    check_given(given, own)
    layout = {**nested, "label_layout": config.label_layout}  # compared above, as published
    backbone = replace(
        export,
        config={**export.config, "architectures": ARCHITECTURES[:1], "dflash_config": layout},
        weights={n: t for n, t in export.weights.items() if n not in own},
    )
    if not load_export(config, model.backbone, backbone):
        return False
    model.load_state_dict(given, strict=False)
    return True


def _check(config: DominoConfig, said: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
    """Compare what would load without an error and then draft something else."""
    shifted = said.get("shift_label")
    if not isinstance(shifted, bool):
        raise CheckpointError(
            f"config.json of the export has shift_label {shifted!r}, which says what its slots "
            "predict: it must be true or false. Add it as the draft was trained"
        )
    layout = "next_token" if shifted else "same_position"
    check_options(
        {
            "label_layout": (layout, config.label_layout),
            **{name: (said.get(name), getattr(config, name)) for name in OPTIONS},
        }
    )
    check_options({"emb_dim": (outer.get("emb_dim", config.emb_dim), config.emb_dim)})  # both alike
