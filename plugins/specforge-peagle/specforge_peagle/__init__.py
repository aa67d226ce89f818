"""P-EAGLE: an EAGLE-3 draft of a few layers that drafts all its tokens in one pass."""

from __future__ import annotations

from functools import partial

import torch
from specforge_dflash.mask_token import mask_token

# a hook is found by its name
from specforge_eagle3 import specforge_adapter, specforge_verify_capture, target_parts  # noqa: F401
from specforge_eagle3.adapter import Eagle3Transform
from specforge_eagle3.config import DraftShape, shape_fields
from specforge_eagle3.frozen import Frozen, TargetParts, parts
from specforge_eagle3.rows import PackedCollate

from specforge_core.hookspecs import hookimpl
from specforge_core.types import (
    CaptureSpec,
    Collate,
    DataInfo,
    Draft,
    Proposer,
    TargetInfo,
    TrainStep,
    Transform,
)

from .config import PeagleConfig
from .elements import ALL_FIELDS, draw_depths, find_elements
from .export import specforge_export as specforge_export, specforge_import as specforge_import
from .model import PeagleModel
from .proposer import PeagleProposer
from .step import PeagleStep


@hookimpl
def specforge_config() -> type[PeagleConfig]:
    """Objective, draft vocabulary and shape of the draft."""
    return PeagleConfig


@hookimpl
def specforge_transform(config: PeagleConfig, spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length`, and draw at which depths their rows are trained."""
    return Eagle3Transform(spec, max_length, config.mask_on, partial(draw_depths, config))


@hookimpl
def specforge_collate(config: PeagleConfig, draft: Draft) -> Collate:
    """Put the samples of a batch behind each other, and find what is trained."""
    model, frozen = parts(draft, PeagleModel)
    frozen.teacher_head(model.d2t)  # read here, so that no step waits for it
    find = partial(find_elements, model.t2d.cpu(), config, model.mask_token_id)
    return PackedCollate(find, ALL_FIELDS, "P-EAGLE")


@hookimpl
def specforge_draft(config: PeagleConfig, target: TargetInfo, data: DataInfo | None) -> Draft:
    """Build the draft around the target's embedding, with its vocabulary's rows of the head."""
    return build_draft(config, target, target_parts(config, target, data))


def build_draft(config: PeagleConfig, target: TargetInfo, given: TargetParts) -> Draft:
    """Build the draft from these parts of the target, as `specforge_eagle3.build_draft` does."""
    shape = DraftShape(**shape_fields(config, target), num_layers=config.num_layers)
    mask_token_id = mask_token(config.mask_token_id, target)
    embed_tokens, load_head, d2t = given
    with torch.device("meta"):
        model = PeagleModel(shape, config, mask_token_id)
    model.start(config, load_head, d2t)
    model.mask_hidden.data.normal_(generator=torch.Generator().manual_seed(config.seed))
    if model.embed_tokens is not None:
        model.embed_tokens.weight.data.copy_(embed_tokens)
    return Draft(
        model=model,
        # an embedding of its own takes the target's place
        frozen=Frozen(embed_tokens[:0] if config.train_embedding else embed_tokens, load_head),
        shard=(*model.layers, model.lm_head),
        compile=tuple(part for layer in model.layers for part in layer.children()),
        # shrunk, the rows of tokens that are rare would vanish
        decayed=lambda name: "embed_tokens" not in name,
        resolved={**shape.resolved(), "mask_token_id": mask_token_id},
    )


@hookimpl
def specforge_train_step(config: PeagleConfig) -> TrainStep:
    """Predict the next tokens all at once, against the target's distributions."""
    return PeagleStep(config)


@hookimpl
def specforge_proposer(config: PeagleConfig, draft: Draft) -> Proposer:
    """Draft a chain in one pass, with the verified rows' keys and values cached."""
    return PeagleProposer(config, *parts(draft, PeagleModel))
