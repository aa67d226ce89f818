"""A tiny draft around random target tensors, and Domino's correction written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from specforge_dflash import build_draft
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from specforge_dflash.model import DFlashModel, Frozen
from specforge_domino.config import DominoConfig
from specforge_domino.model import DominoModel
from torch import Tensor

from specforge_core.batches.loader import sample_generator
from specforge_core.target.head import Head
from specforge_core.types import Batch, Draft, Sample, StepContext, TargetCapture, TargetInfo

VOCAB, HIDDEN, MASK = 41, 24, 40
PROGRESS = 0.375  # of the training, where losses are compared


@dataclass(frozen=True)
class Tiny:
    config: DominoConfig
    target: TargetInfo
    draft: Draft

    @property
    def model(self) -> DominoModel:
        assert isinstance(self.draft.model, DominoModel)
        return self.draft.model

    @property
    def frozen(self) -> Frozen:
        assert isinstance(self.draft.frozen, Frozen)
        return self.draft.frozen


def make_config(**options: Any) -> DominoConfig:
    defaults = {"name": "domino", "num_layers": 2, "block_size": 5, "mask_token_id": MASK}
    defaults |= {"gru_hidden_dim": 7, "emb_dim": 6}
    return DominoConfig.model_validate({**defaults, **options})


def make_tiny(
    softcap: float | None = None,
    scale: float = 1.0,
    bias: bool = False,
    model_type: str = "tiny",
    **options: Any,
) -> Tiny:
    config = make_config(**options)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    settings = {"intermediate_size": 40, "rms_norm_eps": 1e-6, "initializer_range": 0.2}
    target = TargetInfo(
        name_or_path="tiny",
        revision=None,
        hidden_size=HIDDEN,
        num_layers=8,
        vocab_size=VOCAB,
        config={
            **shape,
            **settings,
            "model_type": model_type,
            "rope_theta": 1e3,
            "final_logit_softcapping": softcap,
        },
    )
    gen = torch.Generator().manual_seed(1)
    embed, head = (torch.randn(VOCAB, HIDDEN, generator=gen) for _ in range(2))
    if bias:
        head = Head(weight=head, bias=2 * torch.randn(VOCAB, generator=gen)).joined()
    dflash = build_draft(config, target, embed, head, scale=scale, mask_token_id=MASK)
    assert isinstance(dflash.model, DFlashModel)
    draft = replace(dflash, model=DominoModel(dflash.model, config))
    tiny = Tiny(config, target, draft)
    for name, weight in tiny.model.named_parameters():
        if "norm" in name:  # norms of ones would hide their order
            weight.data += 0.3 * torch.randn(weight.shape, generator=gen)
        elif "backbone" not in name:  # a correction that decides about tokens
            size = 3.0 if name == "embed_proj.2.weight" else 0.5
            weight.data += size * torch.randn(weight.shape, generator=gen)
    return tiny


def make_samples(lengths: tuple[int, ...] = (19, 11, 6)) -> list[Sample]:
    """Ragged samples; part of each is supervised."""
    gen = torch.Generator().manual_seed(2)
    samples = []
    for length in lengths:
        mask = (torch.rand(length, generator=gen) < 0.7).to(torch.uint8)
        mask[3:5] = 1
        ids = torch.randint(1, MASK, (length,), generator=gen)
        features = torch.randn(length, 2 * HIDDEN, generator=gen)
        samples.append({"input_ids": ids, "loss_mask": mask, "hidden_states": features})
    return samples


def make_batch(config: DominoConfig, samples: list[Sample]) -> Batch:
    """What the loader makes of samples: transform, then collate."""
    spec = capture_spec((1, 5), HIDDEN)
    transform = DFlashTransform(spec, 10**6, config.num_anchors)
    drawn = [transform(s, sample_generator(0, 0, i)) for i, s in enumerate(samples)]
    return DFlashCollate(config, spec, MASK)([s for s in drawn if s is not None])


def make_context(progress: float = PROGRESS, training: bool = True) -> StepContext:
    mesh: Any = None
    generator = torch.Generator().manual_seed(0)
    where = {"step": 1, "total_steps": 9, "progress": progress}
    return StepContext(**where, generator=generator, training=training, mesh=mesh)


def captured(sample: Sample, start: int, end: int) -> TargetCapture:
    """What the target says of a part of a sample."""
    states = sample["hidden_states"][start:end].split(HIDDEN, dim=-1)
    ids = sample["input_ids"][start:end]
    return TargetCapture(
        index=0,
        input_ids=ids,
        loss_mask=torch.zeros_like(ids),
        hidden_states=dict(zip((1, 5), states, strict=True)),
    )


# ---- the method, one block and one token at a time, in float64 --------------


def model64(tiny: Tiny) -> DominoModel:
    return deepcopy(tiny.model).double()


def block_states(
    model: DominoModel, tiny: Tiny, features: Tensor, token: int, anchor: int
) -> Tensor:
    """Final states [B, H] of the block that starts with `token` at `anchor`."""
    ids = torch.full((tiny.config.block_size,), MASK)
    ids[0] = token
    slots = tiny.frozen.embed_tokens.double()[ids] * tiny.frozen.scale
    where = torch.tensor([[anchor]]), torch.tensor([[0]]), torch.arange(anchor)[None]
    found: Tensor = model.backbone(features[None, :anchor].double(), slots[None], *where)[0]
    return found


def gru64(model: DominoModel, tiny: Tiny, tokens: list[int]) -> Tensor:
    """The state after `tokens`, by the textbook's equations."""
    w, u = model.prefix_gru.weight_ih_l0, model.prefix_gru.weight_hh_l0
    state = torch.zeros(u.shape[1], dtype=torch.float64)
    for token in tokens:
        x = tiny.frozen.embed_tokens.double()[token] * tiny.frozen.scale
        (xr, xz, xn), (hr, hz, hn) = (w @ x).chunk(3), (u @ state).chunk(3)
        reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        state = (1 - update) * torch.tanh(xn + reset * hn) + update * state
    return state


def token_logits(
    model: DominoModel, tiny: Tiny, state: Tensor, before: list[int]
) -> tuple[Tensor, Tensor]:
    """Base and corrected logits [V] of the token behind `before`, which starts at the anchor."""
    base = tiny.frozen.lm_head[:, :HIDDEN].double() @ state
    if tiny.frozen.has_bias:
        base = base + tiny.frozen.lm_head[:, HIDDEN].double()
    final = base
    if len(before) > tiny.config.pure_draft_prefix_len:
        joined = torch.cat([state, gru64(model, tiny, before)])
        low = dict(model.named_parameters())["embed_proj.0.weight"] @ joined
        low = low * torch.sigmoid(low)
        final = base + dict(model.named_parameters())["embed_proj.2.weight"] @ low
    cap = tiny.frozen.softcap
    if cap is None:
        return base, final
    return cap * torch.tanh(base / cap), cap * torch.tanh(final / cap)


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., DominoConfig] = make_config
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = make_context
    captured: Callable[..., TargetCapture] = captured
    model64: Callable[[Tiny], DominoModel] = model64
    block_states: Callable[..., Tensor] = block_states
    token_logits: Callable[..., tuple[Tensor, Tensor]] = token_logits


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
