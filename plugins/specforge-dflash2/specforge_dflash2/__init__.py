"""DFlash 2: DFlash with convolutions in its blocks, and a selector over its likeliest tokens."""

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

from .config import DFlash2Config
from .export import specforge_export as specforge_export, specforge_import as specforge_import
from .model import DFlash2Model
from .proposer import DFlash2Proposer
from .step import DFlash2Step


@hookimpl
def specforge_config() -> type[DFlash2Config]:
    """DFlash's options, those of convolutions and selector, and the published block."""
    return DFlash2Config


@hookimpl
def specforge_draft(config: DFlash2Config, target: TargetInfo) -> Draft:
    """Build the draft around the target's own embedding and head."""
    return extend(config, specforge_dflash.specforge_draft(config=config, target=target))


def extend(config: DFlash2Config, plain: Draft) -> Draft:
    """Return a DFlash draft, as `specforge_dflash.build_draft` makes it, with what this adds."""
    backbone, _ = parts(plain, DFlashModel)
    model = DFlash2Model(config, backbone)
    layers = tuple(backbone.layers)
    return replace(
        plain,
        model=model,
        # the selector's tables are a fifth of the weights: gathered apart, and no hidden layers
        shard=(*layers, model.candidate_selector),
        compile=layers,
        # without its kernels a layer is shut off: they start at the identity, not at 0
        decayed=lambda name: not name.endswith("base_kernel"),
    )


@hookimpl
def specforge_train_step(config: DFlash2Config) -> TrainStep:
    """Fill blocks at random anchors, and pick each slot's token behind the true one before."""
    return DFlash2Step(config)


@hookimpl
def specforge_proposer(config: DFlash2Config, draft: Draft) -> Proposer:
    """Draft one block at a time, with the context's keys and values cached."""
    return DFlash2Proposer(config, *parts(draft, DFlash2Model))
