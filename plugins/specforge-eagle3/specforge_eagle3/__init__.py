"""EAGLE-3: drafts token by token with one layer, trained on what it is fed when it drafts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.target.head import Head
from specforge_core.target.weights import load_target_tensors
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Collate,
    DataInfo,
    Draft,
    Problem,
    Proposer,
    Sample,
    TargetInfo,
    TrainStep,
    Transform,
)

from .adapter import Eagle3Adapter, Eagle3Transform, check_choices
from .config import DraftShape, Eagle3Config, VocabularyOptions, draft_shape, shape_fields
from .export import specforge_export as specforge_export
from .frozen import Frozen, TargetParts, parts
from .importer import specforge_import as specforge_import
from .model import Eagle3Model
from .proposer import Eagle3Proposer
from .rows import PackedCollate, label_rows
from .step import Eagle3Step
from .vocab import frequent_tokens, offsets, read_map


@hookimpl
def specforge_config() -> type[Eagle3Config]:
    """Objective, draft vocabulary and shape of the draft."""
    return Eagle3Config


@hookimpl
def specforge_adapter(config: VocabularyOptions, target: TargetInfo) -> Adapter:
    """Capture three layers, the final state, the target's own choices and its log-sum-exp."""
    return Eagle3Adapter.build(config, target)


@hookimpl
def specforge_verify_capture(target: TargetInfo, sample: Sample) -> list[Problem]:
    """Report choices of the target beyond its vocabulary."""
    return check_choices(sample, target.vocab_size)


@hookimpl
def specforge_transform(config: Eagle3Config, spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length`; drop those without a label."""
    return Eagle3Transform(spec, max_length, config.mask_on)


@hookimpl
def specforge_collate(config: Eagle3Config, draft: Draft) -> Collate:
    """Put the samples of a batch behind each other, and find what is a label."""
    model, frozen = parts(draft, Eagle3Model)
    frozen.teacher_head(model.d2t)  # read here, so that no step waits for it
    find = partial(
        label_rows, t2d=model.t2d.cpu(), mask_on=config.mask_on, step_weights=config.step_weights
    )
    return PackedCollate(find)


@hookimpl
def specforge_draft(config: Eagle3Config, target: TargetInfo, data: DataInfo | None) -> Draft:
    """Build the draft around the target's embedding, with its vocabulary's rows of the head."""
    return build_draft(config, draft_shape(config, target), *target_parts(config, target, data))


def target_parts(
    config: VocabularyOptions, target: TargetInfo, data: DataInfo | None
) -> TargetParts:
    """Return what a draft is built around.  Raises ConfigError as `shape_fields` does."""
    shape = DraftShape(**shape_fields(config, target))
    # rows beyond the vocabulary are padding
    embedding = load_target_tensors(target, ("embed_tokens",))["embed_tokens"][: target.vocab_size]
    d2t = None if data is None else draft_map(config, shape, data.token_counts)
    return embedding, lambda: Head.load(target).joined(), d2t


def draft_map(config: VocabularyOptions, shape: DraftShape, token_counts: Tensor | None) -> Tensor:
    """Return d2t [Vd] of a new draft: the user's, or the most frequent supervised tokens."""
    if config.vocab_map is not None:
        return read_map(config.vocab_map, shape.draft_vocab_size, shape.vocab_size)
    if shape.full_vocab:
        return torch.zeros(shape.vocab_size, dtype=torch.int64)
    if token_counts is None:
        raise ConfigError(
            "the draft vocabulary is chosen by how often tokens are supervised, and this capture "
            "is still growing. Finish the capture first, or give strategy.vocab_map=FILE or "
            "strategy.draft_vocab_size=full"
        )
    return offsets(frequent_tokens(token_counts, shape.draft_vocab_size))


def build_draft(
    config: Eagle3Config,
    shape: DraftShape,
    embed_tokens: Tensor,
    load_head: Callable[[], Tensor],
    d2t: Tensor | None,
    *,
    device: str = "cpu",
) -> Draft:
    """Build the draft from the target's embedding [V, H] and head, wherever they are from.

    The head is a matrix as `Head.joined` makes it, [V, H] or wider.  `d2t` is None where weights,
    and the vocabulary with them, are about to be loaded.  The weights are float32 on `device`,
    the same for the same seed.
    """
    with torch.device("meta"):
        model = Eagle3Model(shape, config)
    model.start(config, load_head, d2t)
    model.to(device)
    frozen = Frozen(embed_tokens, load_head)
    return Draft(
        model=model,
        frozen=frozen,
        shard=(model.lm_head,),
        compile=(model.before, model.after),
        resolved=shape.resolved(),
    )


@hookimpl
def specforge_train_step(config: Eagle3Config) -> TrainStep:
    """Run the draft on its own output for some steps, against the target's distributions."""
    return Eagle3Step(config)


@hookimpl
def specforge_proposer(config: Eagle3Config, draft: Draft) -> Proposer:
    """Draft a chain or a tree, with the verified rows' keys and values cached."""
    return Eagle3Proposer(config, *parts(draft, Eagle3Model))
