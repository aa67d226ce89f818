"""The hooks of the method, in the order a run calls them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field as Option

from specforge_core import hookimpl
from specforge_core.config import StrategyConfig
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Draft,
    Export,
    Field,
    Proposer,
    Sample,
    TargetCapture,
    TargetInfo,
    TrainStep,
)

from .export import load_export, make_export
from .model import Blocks, FrozenHead
from .proposer import ChainProposer
from .step import ChainStep


class ExampleConfig(StrategyConfig):
    """Options of the method: the section `strategy:`."""

    draft_tokens: int = Option(3, gt=0, le=1024, description="Tokens drafted at once.")
    seed: int = Option(0, ge=0, le=2**32 - 1, description="Of the first weights.")


@dataclass(frozen=True)
class FinalState:
    """Stores the target's last state, after its final norm."""

    spec: CaptureSpec

    def __call__(self, capture: TargetCapture) -> Sample:
        assert capture.final is not None  # the spec asks for it
        return {
            "input_ids": capture.input_ids,
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "final": capture.final.bfloat16(),
        }


@hookimpl
def specforge_config() -> type[ExampleConfig]:
    """Return the model of the section `strategy:`."""
    return ExampleConfig


@hookimpl
def specforge_adapter(target: TargetInfo) -> Adapter:
    """Ask for the final state; None in a shape is the token axis."""
    tokens = Field(shape=(None,), dtype="int64")
    mask = Field(shape=(None,), dtype="uint8")
    state = Field(shape=(None, target.hidden_size), dtype="bfloat16")
    fields = {"input_ids": tokens, "loss_mask": mask, "final": state}
    return FinalState(CaptureSpec(layers=(), final="post_norm", fields=fields))


@hookimpl
def specforge_draft(config: ExampleConfig, target: TargetInfo) -> Draft:
    """Build what is trained, seeded by the config alone, and the target's head beside it."""
    model = Blocks(target.hidden_size, config.draft_tokens, config.seed)
    frozen = FrozenHead.load(target)
    return Draft(model=model, frozen=frozen, hidden=tuple(model.blocks))


@hookimpl
def specforge_train_step(config: ExampleConfig) -> TrainStep:
    """Return the loss of one micro-batch."""
    return ChainStep(config.draft_tokens)


@hookimpl
def specforge_proposer(draft: Draft) -> Proposer:
    """Return what drafts while decoding."""
    return ChainProposer(draft)


@hookimpl
def specforge_export(draft: Draft, target: TargetInfo, format: str) -> Export | None:
    """Export as plain safetensors; add the formats of engines that serve the method."""
    return make_export(draft, target) if format == "hf" else None


@hookimpl
def specforge_import(draft: Draft, target: TargetInfo, export: Export) -> bool:
    """Load what `specforge_export` wrote."""
    load_export(draft, target, export)
    return True
