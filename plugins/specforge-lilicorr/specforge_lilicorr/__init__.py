"""LiLiCorr: DFlash's blocks, with a small transformer that picks a path through their tokens."""

from __future__ import annotations

from dataclasses import replace

import specforge_dflash
from specforge_dflash import (  # noqa: F401  # a hook is found by its name
    specforge_adapter,
    specforge_collate,
    specforge_transform,
    specforge_verify_capture,
)
from specforge_dflash.model import DFlashModel, parts

from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Proposer, TargetInfo, TrainStep

from .config import LiLiCorrConfig
from .export import specforge_export as specforge_export, specforge_import as specforge_import
from .model import LiLiCorrModel
from .proposer import LiLiCorrProposer
from .step import LiLiCorrStep

# zeros at first, as biases are, or the identity: shrinking them shuts something off
NOT_DECAYED = ("base_kernel", "_embedding", "relative_slot_bias")


@hookimpl
def specforge_config() -> type[LiLiCorrConfig]:
    """DFlash's options, and those of lattice, objective and convolutions."""
    return LiLiCorrConfig


@hookimpl
def specforge_draft(config: LiLiCorrConfig, target: TargetInfo) -> Draft:
    """Build DFlash's draft around the target's embedding and head, and the lattice."""
    return extend(config, specforge_dflash.specforge_draft(config=config, target=target))


def extend(config: LiLiCorrConfig, plain: Draft) -> Draft:
    """Return a LiLiCorr draft around a DFlash draft."""
    model = LiLiCorrModel(config, parts(plain, DFlashModel)[0])
    layers = tuple(model.backbone.layers)
    both = (*layers, *model.lilicorr.layers)
    return replace(
        plain,
        model=model,
        shard=both,
        compile=layers,
        hidden=both,
        decayed=lambda name: not name.endswith(NOT_DECAYED),
    )


@hookimpl
def specforge_train_step(config: LiLiCorrConfig) -> TrainStep:
    """Fill blocks at random anchors, and pick each slot's token behind the true one before."""
    return LiLiCorrStep(config)


@hookimpl
def specforge_proposer(config: LiLiCorrConfig, draft: Draft) -> Proposer:
    """Draft one block at a time, with the context's keys and values cached."""
    return LiLiCorrProposer(config, *parts(draft, LiLiCorrModel))
