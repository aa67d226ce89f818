"""A tiny draft around random target tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specforge_eagle3 import Eagle3Config, build_draft
from specforge_eagle3.config import draft_shape
from specforge_eagle3.rows import FIELDS, label_rows
from specforge_eagle3.vocab import offsets
from torch import Tensor

from specforge_core.batches.collate import pack
from specforge_core.types import Batch, StepContext, TargetInfo

from .exact import EPS, Exact, Tiny, objective, sample_states

VOCAB, DRAFT_VOCAB, HIDDEN, LAYERS = 29, 17, 24, 8
TARGET_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "initializer_range": 0.2,
}


def make_config(**options: Any) -> Eagle3Config:
    defaults: dict[str, Any] = {"name": "eagle3", "steps": 3, "draft_vocab_size": DRAFT_VOCAB}
    return Eagle3Config.model_validate({**defaults, **options})


def make_target(**overrides: Any) -> TargetInfo:
    return TargetInfo(
        name_or_path="tiny",
        revision=None,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        vocab_size=VOCAB,
        config={**TARGET_CONFIG, **overrides},
    )


def make_tiny(
    dtype: torch.dtype = torch.float32, softcap: float | None = None, **options: Any
) -> Tiny:
    config = make_config(**options)
    target = make_target(final_logit_softcapping=softcap)
    embed, head, gen = target_tensors()
    tokens = torch.randperm(VOCAB, generator=gen)[:DRAFT_VOCAB].sort().values
    if config.draft_vocab_size == "full":
        tokens = torch.arange(VOCAB)
    shape = draft_shape(config, target)
    draft = build_draft(config, shape, embed.to(dtype), lambda: head, offsets(tokens))
    for name, weight in draft.model.named_parameters():
        if "norm" in name:  # norms of ones would hide their order
            weight.data += 0.3 * torch.randn(weight.shape, generator=gen)
        if name == "lm_head.weight":  # trained away from the teacher's
            weight.data += 0.2 * torch.randn(weight.shape, generator=gen)
    draft.model.to(dtype)
    return Tiny(config, target, draft, head)


def make_samples(
    lengths: tuple[int, ...] = (13, 9, 3), seed: int = 2, softcap: float | None = None
) -> list[dict[str, Tensor]]:
    """Ragged samples; part of each is supervised, part of the choices cannot be drafted."""
    gen = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        mask = (torch.rand(length, generator=gen) < 0.7).to(torch.uint8)
        mask[2:4] = 1
        samples.append(
            {
                "input_ids": torch.randint(VOCAB, (length,), generator=gen),
                "loss_mask": mask,
                "hidden_states": torch.randn(length, 3 * HIDDEN, generator=gen),
                "final": torch.randn(length, HIDDEN, generator=gen),
                "target_argmax": torch.randint(VOCAB, (length,), generator=gen),
            }
        )
    return [{**s, "target_logsumexp": logsumexp(s["final"], softcap)} for s in samples]


def target_tensors() -> tuple[Tensor, Tensor, torch.Generator]:
    """Return the tiny target's embedding and head, both [V, H], and a generator for the rest."""
    gen = torch.Generator().manual_seed(1)
    embed = torch.randn(VOCAB, HIDDEN, generator=gen)
    return embed, torch.randn(VOCAB, HIDDEN, generator=gen) * 0.5, gen


def logsumexp(final: Tensor, softcap: float | None) -> Tensor:
    """Return what the engine computes from final states [T, H], over the whole vocabulary."""
    scores = final.double() @ target_tensors()[1].double().t()
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.logsumexp(-1).float()


def make_batch(tiny: Tiny, samples: list[dict[str, Tensor]], arrange: Any = pack) -> Batch:
    """Return what the strategy's collate makes of samples, packed or padded before."""
    batch = arrange(samples, FIELDS)
    config = tiny.config
    return label_rows(batch, tiny.model.t2d.cpu(), config.mask_on, config.step_weights)


def make_context(seed: int = 0, **where: Any) -> StepContext:
    generator = torch.Generator().manual_seed(seed)
    alone: Any = {"step": 0, "total_steps": 1, "training": True, "mesh": None, **where}
    return StepContext(generator=generator, **alone)


def weights64(tiny: Tiny) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in tiny.model.named_parameters()}


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., Eagle3Config] = make_config
    target: Callable[..., TargetInfo] = make_target
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[dict[str, Tensor]]] = make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = make_context
    states64: Callable[..., list[dict[int, Tensor]]] = sample_states
    objective64: Callable[..., Exact] = objective
    weights64: Callable[[Tiny], dict[str, Tensor]] = weights64


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
