"""DFlash: drafts a whole block of tokens at once, reading the target's states in every layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.nn.decoder import init_weights
from specforge_core.target.measure import HeadScale
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Collate,
    Draft,
    Export,
    Problem,
    Proposer,
    Sample,
    TargetInfo,
    TrainStep,
    Transform,
)

from .adapter import DFlashAdapter, check_choices
from .anchors import DFlashTransform
from .collate import DFlashCollate, train_slots as train_slots
from .config import DFlashConfig, DFlashOptions, draft_shape, objective
from .export import export_draft, load_export
from .mask_token import mask_token, mask_token_occurs
from .model import DFlashModel, Frozen, backbone_of, parts
from .proposer import DFlashProposer
from .step import DFlashStep

ROWS = 512  # of the target's head that are widened at a time


@hookimpl
def specforge_config() -> type[DFlashOptions]:
    """Block, objective and shape of the draft."""
    return DFlashOptions


@hookimpl
def specforge_adapter(config: DFlashConfig, target: TargetInfo) -> Adapter:
    """Capture the chosen layers' outputs side by side, and what the objective asks for besides."""
    return DFlashAdapter.build(config, target)


@hookimpl
def specforge_verify_capture(
    config: DFlashConfig, target: TargetInfo, sample: Sample
) -> list[Problem]:
    """Report a mask token named in the config that occurs in the text, and choices of no token."""
    problems, token = check_choices(sample, target.vocab_size), config.mask_token_id
    if token is not None and bool((sample["input_ids"] == token).any()):
        text = mask_token_occurs(token, token, "the sample")
        problems.append(Problem(where="input_ids", message=text))
    return problems


@hookimpl
def specforge_transform(config: DFlashConfig, spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length` and draw their anchors; drop those without one."""
    weights = objective(config).prefix_weights
    return DFlashTransform(spec, max_length, config.num_anchors, weights)


@hookimpl
def specforge_collate(config: DFlashConfig, spec: CaptureSpec, draft: Draft) -> Collate:
    """Put samples behind each other, with the blocks that start at their anchors."""
    return DFlashCollate(config, spec, backbone_of(draft.model).shape.mask_token_id)


@hookimpl
def specforge_draft(config: DFlashConfig, target: TargetInfo) -> Draft:
    """Build the draft around the target's own embedding and head."""
    from specforge_core.target.head import Head
    from specforge_core.target.weights import embedding_scale, load_target_tensors

    embedding = load_target_tensors(target, ("embed_tokens",))["embed_tokens"]
    embedding = embedding[: target.vocab_size]  # no padding
    given = Head.load(target)
    head = replace(given, scale=1.0).joined()
    return build_draft(
        config,
        target,
        embedding,
        embedding if torch.equal(head, embedding) else head,
        scale=embedding_scale(target),
        beside=HeadScale(scale=given.scale, softcap=given.softcap),
        mask_token_id=mask_token(config.mask_token_id, target),
    )


def build_draft(
    config: DFlashConfig,
    target: TargetInfo,
    embed_tokens: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    scale: float = 1.0,
    beside: HeadScale | None = None,
    mask_token_id: int,
    device: str = "cpu",
) -> Draft:
    """Build the draft from the target's embedding [V, H] and head, wherever they are from.

    The head is a matrix as `Head.joined` makes it, [V, H] or wider; `beside` is what the target
    does to its logits else, not set as the draft's.

    The weights are float32 on `device`, the same for the same seed.
    """
    shape = draft_shape(config, target, mask_token_id)
    with torch.device("meta"):
        model = DFlashModel(shape, config.attention)
    model.to_empty(device="cpu")
    init_weights(model, shape.init_std, config.seed)
    # states of unit size then give logits that spread by about 1, whatever the head's scale
    torch.nn.init.constant_(model.norm.weight, 1 / _mean_norm(lm_head))
    model.to(device)
    frozen = Frozen(embed_tokens, lm_head, scale, shape.softcap, beside)
    return Draft(model=model, frozen=frozen, shard=tuple(model.layers), resolved=shape.resolved())


def _mean_norm(matrix: torch.Tensor) -> float:
    """Return the mean norm of a matrix's rows [V, H], in float32.

    A few rows at a time, in memory that is used again: a large head's copy would take a second,
    most of it for fresh pages.
    """
    wide = torch.empty_like(matrix[:ROWS], dtype=torch.float32)
    parts = torch.split(matrix, ROWS)
    return float(torch.cat([wide[: len(p)].copy_(p).norm(dim=1) for p in parts]).mean())


@hookimpl
def specforge_train_step(config: DFlashConfig) -> TrainStep:
    """Fill blocks at random anchors, weighted towards their beginnings."""
    return DFlashStep(config)


@hookimpl
def specforge_proposer(config: DFlashConfig, draft: Draft) -> Proposer:
    """Draft one block at a time, with the context's keys and values cached."""
    if (fewest := objective(config).variable_prefix) > 1:
        raise ConfigError(
            f"a draft trained with variable_prefix {fewest} goes on behind "
            "another's tokens, and was never asked to draft from the last verified one alone. "
            "Try: train with strategy.variable_prefix=1, which asks both"
        )
    return DFlashProposer(config, *parts(draft, DFlashModel))


@hookimpl
def specforge_export(
    config: DFlashConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf, sglang, vllm."""
    return export_draft(config, draft, target, format)


@hookimpl
def specforge_import(config: DFlashConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back, refusing what was made for another draft."""
    return load_export(config, draft.model, export)
