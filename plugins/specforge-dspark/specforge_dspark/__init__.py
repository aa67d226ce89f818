"""DSpark: DFlash's blocks, drafted token by token through a Markov head, with a confidence."""

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

from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Proposer, TargetInfo, TrainStep

from .config import DSparkConfig
from .export import specforge_export as specforge_export, specforge_import as specforge_import
from .model import DSparkModel
from .proposer import DSparkProposer
from .step import DSparkStep


@hookimpl
def specforge_config() -> type[DSparkConfig]:
    """Block, heads, objective and shape of the draft."""
    return DSparkConfig


@hookimpl
def specforge_draft(config: DSparkConfig, target: TargetInfo) -> Draft:
    """Build DFlash's draft around the target's embedding and head, and the two heads."""
    plain = specforge_dflash.specforge_draft(config=config, target=target)
    return replace(plain, model=DSparkModel(parts(plain, DFlashModel)[0], config))


@hookimpl
def specforge_train_step(config: DSparkConfig) -> TrainStep:
    """Fill blocks at random anchors: the data's tokens, the target's distribution, confidence."""
    if config.record_confidence is not None:
        raise ConfigError("record_confidence is of one draft. Try: strategy.record_confidence=null")
    return DSparkStep(config)


@hookimpl
def specforge_proposer(config: DSparkConfig, draft: Draft) -> Proposer:
    """Draft one block at a time, token by token."""
    return DSparkProposer(config, *parts(draft, DSparkModel))
