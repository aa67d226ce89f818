"""Domino: DFlash's block of tokens, each corrected by the tokens drafted before it."""

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

from .config import DominoConfig
from .export import specforge_export as specforge_export, specforge_import as specforge_import
from .model import DominoModel
from .proposer import DominoProposer
from .step import DominoStep


@hookimpl
def specforge_config() -> type[DominoConfig]:
    """Block, objective and shape of the draft."""
    return DominoConfig


@hookimpl
def specforge_draft(config: DominoConfig, target: TargetInfo) -> Draft:
    """Build DFlash's draft around the target's embedding and head, and the correction."""
    plain = specforge_dflash.specforge_draft(config=config, target=target)
    return replace(plain, model=DominoModel(parts(plain, DFlashModel)[0], config))


@hookimpl
def specforge_train_step(config: DominoConfig) -> TrainStep:
    """Fill blocks at random anchors, from the backbone's logits to the corrected ones."""
    return DominoStep(config)


@hookimpl
def specforge_proposer(config: DominoConfig, draft: Draft) -> Proposer:
    """Draft one block at a time, token by token."""
    return DominoProposer(config, *parts(draft, DominoModel))
