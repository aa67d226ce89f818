"""A tiny draft around random target tensors, and DSpark's heads written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from specforge_dspark.config import DSparkConfig
from specforge_dspark.model import DSparkModel
from torch import Tensor

from specforge_core.types import Batch, Sample, StepContext, TargetCapture

from ... import dflash_kit as dflash
from ...dflash_kit import Tiny


def make_config(**options: Any) -> DSparkConfig:
    defaults = {"name": "dspark", "num_layers": 2, "block_size": 4, "mask_token_id": 40}
    defaults |= {"markov_rank": 6}
    return DSparkConfig.model_validate({**defaults, **options})


def vary(name: str) -> float:
    """Norms of ones would hide their order; heads decide about tokens."""
    if "norm" in name:
        return 0.3
    return 0.0 if "backbone" in name else 1.0


def make_tiny(
    softcap: float | None = None,
    scale: float = 1.0,
    head_scale: float = 1.0,
    bias: bool = False,
    model_type: str = "tiny",
    **options: Any,
) -> Tiny:
    config = make_config(**options)
    return dflash.make_tiny(
        config,
        lambda plain: replace(plain, model=DSparkModel(plain.model, config)),
        vary,
        softcap=softcap,
        scale=scale,
        head_scale=head_scale,
        bias=bias,
        model_type=model_type,
    )


def make_batch(config: DSparkConfig, samples: list[Sample]) -> Batch:
    return dflash.make_batch(config, samples)


# ---- the method, one block and one token at a time, in float64 --------------


def model64(tiny: Tiny) -> Any:
    return deepcopy(tiny.model).double()


def target_probs(tiny: Tiny, final: Tensor) -> Tensor:
    """What the target draws from behind a final state [H]."""
    out = dflash.head_product(tiny, final.double()) * tiny.frozen.beside.scale
    out = dflash.capped(out, tiny.frozen.beside.softcap)
    return out.exp() / out.exp().sum()


def chain(
    model: Any, tiny: Tiny, states: Tensor, before: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [V] and confidence logits of the slots of `states` [D, H], behind `before` [D]."""
    p, config = dict(model.named_parameters()), tiny.config
    recurrent = torch.zeros(config.markov_rank, dtype=torch.float64)
    logits, confidences = [], []
    for state, token in zip(states, before, strict=True):
        e = p["markov_head.markov_w1.weight"][token]
        latent = e
        if config.markov_head == "gated":
            w, b = (p[f"markov_head.gate_proj.{n}"] for n in ("weight", "bias"))
            latent = torch.sigmoid(w @ torch.cat([state, e]) + b) * e
        elif config.markov_head == "rnn":
            w, b = (p[f"markov_head.joint_proj.{n}"] for n in ("weight", "bias"))
            keep, candidate, out = (w @ torch.cat([recurrent, e, state]) + b).chunk(3)
            latent, keep = torch.tanh(out), torch.sigmoid(keep)
            recurrent = keep * recurrent + (1 - keep) * torch.tanh(candidate)
        logits.append(dflash.head_product(tiny, state) + p["markov_head.markov_w2.weight"] @ latent)
        if config.confidence_head:
            read = torch.cat([state, e]) if config.confidence_with_markov else state
            w, b = (p[f"confidence_head.proj.{n}"] for n in ("weight", "bias"))
            confidences.append((w @ read + b)[0])
    return logits, confidences


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., DSparkConfig] = make_config
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = dflash.make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = dflash.make_context
    captured: Callable[..., TargetCapture] = dflash.captured
    model64: Callable[[Tiny], Any] = model64
    block_states: Callable[..., Tensor] = dflash.block_states
    target_probs: Callable[..., Tensor] = target_probs
    chain: Callable[..., tuple[list[Tensor], list[Tensor]]] = chain


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
