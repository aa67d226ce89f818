"""A tiny draft around random target tensors, and Domino's correction written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from specforge_dflash.model import DFlashModel
from specforge_domino.config import DominoConfig
from specforge_domino.model import DominoModel
from torch import Tensor

from specforge_core.types import Batch, Draft, Sample, StepContext, TargetCapture

from ... import dflash_kit as dflash
from ...dflash_kit import Tiny

PROGRESS = 0.375  # of the training, where losses are compared


def make_config(**options: Any) -> DominoConfig:
    defaults = {"name": "domino", "num_layers": 2, "block_size": 5, "mask_token_id": 40}
    defaults |= {"gru_hidden_dim": 7, "emb_dim": 6}
    return DominoConfig.model_validate({**defaults, **options})


def vary(name: str) -> float:
    """Norms of ones would hide their order; the correction decides about tokens."""
    if "norm" in name:
        return 0.3
    if "backbone" in name:
        return 0.0
    return 3.0 if name == "embed_proj.2.weight" else 0.5


def make_tiny(
    softcap: float | None = None,
    scale: float = 1.0,
    bias: bool = False,
    model_type: str = "tiny",
    **options: Any,
) -> Tiny:
    config = make_config(**options)

    def extend(plain: Draft) -> Draft:
        assert isinstance(plain.model, DFlashModel)
        return replace(plain, model=DominoModel(plain.model, config))

    more: Any = {"softcap": softcap, "scale": scale, "bias": bias, "model_type": model_type}
    return dflash.make_tiny(config, extend, vary, **more)


def make_batch(config: DominoConfig, samples: list[Sample]) -> Batch:
    return dflash.make_batch(config, samples)


def make_context(progress: float = PROGRESS, training: bool = True) -> StepContext:
    return dflash.make_context(progress, training)


# ---- the method, one block and one token at a time, in float64 --------------


def model64(tiny: Tiny) -> Any:
    return deepcopy(tiny.model).double()


def gru64(model: Any, tiny: Tiny, tokens: list[int]) -> Tensor:
    """The state after `tokens`, by the textbook's equations."""
    w, u = model.prefix_gru.weight_ih_l0, model.prefix_gru.weight_hh_l0
    state = torch.zeros(u.shape[1], dtype=torch.float64)
    for token in tokens:
        x = tiny.frozen.embed_tokens.double()[token] * tiny.frozen.scale
        (xr, xz, xn), (hr, hz, hn) = (w @ x).chunk(3), (u @ state).chunk(3)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        state = (1 - update) * torch.tanh(xn + reset * hn) + update * state
    return state


def token_logits(model: Any, tiny: Tiny, state: Tensor, before: list[int]) -> tuple[Tensor, Tensor]:
    """Base and corrected logits [V] of the token behind `before`, which starts at the anchor."""
    base = dflash.head_product(tiny, state)
    final = base
    if len(before) > tiny.config.pure_draft_prefix_len:
        joined = torch.cat([state, gru64(model, tiny, before)])
        low = dict(model.named_parameters())["embed_proj.0.weight"] @ joined
        low = low * torch.sigmoid(low)
        final = base + dict(model.named_parameters())["embed_proj.2.weight"] @ low
    cap = tiny.frozen.softcap
    return dflash.capped(base, cap), dflash.capped(final, cap)


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., DominoConfig] = make_config
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = dflash.make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = make_context
    captured: Callable[..., TargetCapture] = dflash.captured
    model64: Callable[[Tiny], Any] = model64
    block_states: Callable[..., Tensor] = dflash.block_states
    token_logits: Callable[..., tuple[Tensor, Tensor]] = token_logits


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
