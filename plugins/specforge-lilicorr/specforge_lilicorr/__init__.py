"""LiLiCorr: DFlash's blocks, with a small transformer that picks a path through their tokens."""

from __future__ import annotations

from dataclasses import replace

import specforge_dflash
from specforge_dflash import (  # noqa: F401  # a hook is found by its name
    specforge_transform,
    specforge_verify_capture,
)
from specforge_dflash.adapter import DFlashAdapter
from specforge_dflash.collate import DFlashCollate
from specforge_dflash.final import FinalAdapter
from specforge_dflash.model import DFlashModel, Frozen

from specforge_core.hookspecs import hookimpl
from specforge_core.target.head import head_scale
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Collate,
    Draft,
    Export,
    Proposer,
    TargetInfo,
    TrainStep,
)

from .collate import LiLiCorrCollate
from .config import LiLiCorrConfig
from .export import export_draft, load_export
from .model import LiLiCorrModel, Target
from .proposer import LiLiCorrProposer
from .step import LiLiCorrStep

# zeros at first, as biases are, or the identity: shrinking them shuts something off
NOT_DECAYED = ("base_kernel", "_embedding", "relative_slot_bias")


@hookimpl
def specforge_config() -> type[LiLiCorrConfig]:
    """DFlash's options, and those of lattice, objective and convolutions."""
    return LiLiCorrConfig


@hookimpl
def specforge_adapter(config: LiLiCorrConfig, target: TargetInfo) -> Adapter:
    """Capture the chosen layers' outputs side by side, and the final state if the loss needs it."""
    return (FinalAdapter if config.penalty_weight else DFlashAdapter).build(config, target)


@hookimpl
def specforge_collate(config: LiLiCorrConfig, spec: CaptureSpec, draft: Draft) -> Collate:
    """Make DFlash's batches, and say which blocks have a lattice."""
    assert isinstance(draft.model, LiLiCorrModel)
    mask = draft.model.backbone.shape.mask_token_id
    return LiLiCorrCollate(DFlashCollate(config, spec, mask))


@hookimpl
def specforge_draft(config: LiLiCorrConfig, target: TargetInfo) -> Draft:
    """Build DFlash's draft around the target's embedding and head, and the lattice."""
    config.check(target)
    plain = specforge_dflash.specforge_draft(config=config, target=target)
    return extend(config, plain, head_scale(target).scale)


def extend(config: LiLiCorrConfig, plain: Draft, scale: float) -> Draft:
    """Return a LiLiCorr draft around a DFlash draft; `scale` is what the target's logits have."""
    assert isinstance(plain.model, DFlashModel)
    assert isinstance(plain.frozen, Frozen)
    model = LiLiCorrModel(config, plain.model)
    layers, lattice = tuple(plain.model.layers), tuple(model.lilicorr.layers)
    return replace(
        plain,
        model=model,
        frozen=Target(plain.frozen, scale),
        shard=(*layers, *lattice),
        compile=layers,
        hidden=(*layers, *lattice),
        decayed=lambda name: not name.endswith(NOT_DECAYED),
    )


@hookimpl
def specforge_train_step(config: LiLiCorrConfig) -> TrainStep:
    """Fill blocks at random anchors, and pick each slot's token behind the true one before."""
    return LiLiCorrStep(config)


@hookimpl
def specforge_proposer(config: LiLiCorrConfig, draft: Draft) -> Proposer:
    """Draft one block at a time, with the context's keys and values cached."""
    assert isinstance(draft.model, LiLiCorrModel)
    assert isinstance(draft.frozen, Target)
    return LiLiCorrProposer(config, draft.model, draft.frozen)


@hookimpl
def specforge_export(
    config: LiLiCorrConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and sglang; vllm is refused with the reason."""
    return export_draft(config, draft, target, format)


@hookimpl
def specforge_import(config: LiLiCorrConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back, refusing what was made for another draft."""
    assert isinstance(draft.model, LiLiCorrModel)
    return load_export(config, draft.model, export)
