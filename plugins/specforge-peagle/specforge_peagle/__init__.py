"""P-EAGLE: an EAGLE-3 draft of a few layers that drafts all its tokens in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specforge_eagle3 import draft_map, specforge_verify_capture  # noqa: F401  # found by its name
from specforge_eagle3.adapter import Eagle3Adapter
from specforge_eagle3.frozen import Frozen
from specforge_eagle3.vocab import members, target_tokens
from torch import Tensor

from specforge_core.hookspecs import hookimpl
from specforge_core.target.head import Head
from specforge_core.target.weights import load_target_tensors
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Collate,
    DataInfo,
    Draft,
    Export,
    Proposer,
    TargetInfo,
    TrainStep,
    Transform,
)

from .config import PeagleConfig, PeagleShape, peagle_shape
from .dropping import PeagleTransform
from .elements import PeagleCollate
from .export import export_draft, load_draft
from .model import PeagleLayer, PeagleModel
from .proposer import PeagleProposer
from .step import PeagleStep


@hookimpl
def specforge_config() -> type[PeagleConfig]:
    """Objective, draft vocabulary and shape of the draft."""
    return PeagleConfig


@hookimpl
def specforge_adapter(config: PeagleConfig, target: TargetInfo) -> Adapter:
    """Capture what EAGLE-3 does."""
    return Eagle3Adapter.build(config.eagle3, target)


@hookimpl
def specforge_transform(config: PeagleConfig, spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length`, and draw at which depths their rows are trained."""
    return PeagleTransform(config, spec, max_length)


@hookimpl
def specforge_collate(config: PeagleConfig, draft: Draft) -> Collate:
    """Put the samples of a batch behind each other, and find what is trained."""
    model, frozen = draft.model, draft.frozen
    assert isinstance(model, PeagleModel)
    assert isinstance(frozen, Frozen)
    frozen.teacher_head(model.d2t)  # read here, so that no step waits for it
    return PeagleCollate(config, model.t2d.cpu(), model.shape.mask_token_id)


@hookimpl
def specforge_draft(config: PeagleConfig, target: TargetInfo, data: DataInfo | None) -> Draft:
    """Build the draft around the target's embedding, with its vocabulary's rows of the head."""
    shape = peagle_shape(config, target)
    # rows beyond the vocabulary are padding
    embedding = load_target_tensors(target, ("embed_tokens",))["embed_tokens"][: target.vocab_size]
    d2t = None if data is None else draft_map(config.eagle3, shape, data.token_counts)
    return build_draft(config, shape, embedding, lambda: Head.load(target).joined(), d2t)


def build_draft(
    config: PeagleConfig,
    shape: PeagleShape,
    embed_tokens: Tensor,
    load_head: Callable[[], Tensor],
    d2t: Tensor | None,
) -> Draft:
    """Build the draft from the target's embedding [V, H] and head, wherever they are from.

    The head is a matrix as `Head.joined` makes it, [V, H] or wider.  `d2t` is None where weights,
    and the vocabulary with them, are about to be loaded.  The weights are float32, the same for
    the same seed.
    """
    with torch.device("meta"):
        model = PeagleModel(shape, config.attention, config.head_chunk, config.train_embedding)
    model.to_empty(device="cpu")
    model.init_weights(config.seed)
    with torch.no_grad():
        if model.embed_tokens is not None:
            model.embed_tokens.weight.copy_(embed_tokens)
        if d2t is not None:
            model.d2t.copy_(d2t)
            model.t2d.copy_(members(d2t, shape.vocab_size))
            rows = load_head()[target_tokens(d2t)]
            model.lm_head.weight.copy_(rows[:, : shape.hidden_size])
    model.lm_head.requires_grad_(config.train_head)
    layers = [layer for layer in model.layers if isinstance(layer, PeagleLayer)]
    parts = [part for layer in layers for part in (layer.before, layer.after)]
    return Draft(
        model=model,
        # an embedding of its own takes the target's place
        frozen=Frozen(embed_tokens[:0] if config.train_embedding else embed_tokens, load_head),
        shard=tuple(layers),
        compile=tuple(parts),
        # shrunk, the rows of tokens that are rare would vanish
        decayed=lambda name: "embed_tokens" not in name,
        resolved=shape.resolved(),
    )


@hookimpl
def specforge_train_step(config: PeagleConfig) -> TrainStep:
    """Predict the next tokens all at once, against the target's distributions."""
    return PeagleStep(config)


@hookimpl
def specforge_proposer(config: PeagleConfig, draft: Draft) -> Proposer:
    """Draft a chain in one pass, with the verified rows' keys and values cached."""
    assert isinstance(draft.model, PeagleModel)
    assert isinstance(draft.frozen, Frozen)
    return PeagleProposer(config, draft.model, draft.frozen)


@hookimpl
def specforge_export(
    config: PeagleConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and vllm; sglang is refused with the reason."""
    return export_draft(config, draft, target, format)


@hookimpl
def specforge_import(draft: Draft, export: Export) -> bool:
    """Read a published checkpoint, in any of its spellings."""
    return load_draft(draft, export)
