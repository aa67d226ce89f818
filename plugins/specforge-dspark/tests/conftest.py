"""A tiny draft around random target tensors, and DSpark's heads written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specforge_dflash import build_draft
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from specforge_dflash.final import with_final
from specforge_dspark import with_heads
from specforge_dspark.collate import DSparkCollate
from specforge_dspark.config import DSparkConfig
from specforge_dspark.model import DSparkModel, Target
from torch import Tensor

from specforge_core.batches.loader import sample_generator
from specforge_core.target.head import Head
from specforge_core.target.measure import HeadScale
from specforge_core.types import Batch, Draft, Sample, StepContext, TargetCapture, TargetInfo

VOCAB, HIDDEN, MASK = 41, 24, 40


@dataclass(frozen=True)
class Tiny:
    config: DSparkConfig
    target: TargetInfo
    draft: Draft

    @property
    def model(self) -> DSparkModel:
        assert isinstance(self.draft.model, DSparkModel)
        return self.draft.model

    @property
    def frozen(self) -> Target:
        assert isinstance(self.draft.frozen, Target)
        return self.draft.frozen


def make_config(**options: Any) -> DSparkConfig:
    defaults = {"name": "dspark", "num_layers": 2, "block_size": 4, "mask_token_id": MASK}
    defaults |= {"markov_rank": 6}
    return DSparkConfig.model_validate({**defaults, **options})


def make_tiny(
    softcap: float | None = None,
    scale: float = 1.0,
    head_scale: float = 1.0,
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
    plain = build_draft(config, target, embed, head, scale=scale, mask_token_id=MASK)
    tiny = Tiny(
        config, target, with_heads(config, plain, HeadScale(scale=head_scale, softcap=softcap))
    )
    for name, weight in tiny.model.named_parameters():
        if "norm" in name:  # norms of ones would hide their order
            weight.data += 0.3 * torch.randn(weight.shape, generator=gen)
        elif "backbone" not in name:  # heads that decide about tokens
            weight.data += 1.0 * torch.randn(weight.shape, generator=gen)
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
        final = torch.randn(length, HIDDEN, generator=gen)
        tokens = {"input_ids": ids, "loss_mask": mask}
        samples.append({**tokens, "hidden_states": features, "final": final})
    return samples


def make_batch(config: DSparkConfig, samples: list[Sample]) -> Batch:
    """What the loader makes of samples: transform, then collate."""
    spec = with_final(capture_spec((1, 5), HIDDEN), HIDDEN)
    transform = DFlashTransform(spec, 10**6, config.num_anchors)
    drawn = [transform(s, sample_generator(0, 0, i)) for i, s in enumerate(samples)]
    return DSparkCollate(DFlashCollate(config, spec, MASK))([s for s in drawn if s is not None])


def make_context() -> StepContext:
    mesh: Any = None
    generator = torch.Generator().manual_seed(0)
    return StepContext(step=1, total_steps=9, generator=generator, training=True, mesh=mesh)


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


def model64(tiny: Tiny) -> DSparkModel:
    return deepcopy(tiny.model).double()


def block_states(
    model: DSparkModel, tiny: Tiny, features: Tensor, token: int, anchor: int
) -> Tensor:
    """Final states [B, H] of the block that starts with `token` at `anchor`."""
    ids = torch.full((tiny.config.block_size,), MASK)
    ids[0] = token
    slots = tiny.frozen.embed_tokens.double()[ids] * tiny.frozen.scale
    where = torch.tensor([[anchor]]), torch.tensor([[0]]), torch.arange(anchor)[None]
    found: Tensor = model.backbone(features[None, :anchor].double(), slots[None], *where)[0]
    return found


def head_logits(tiny: Tiny, state: Tensor) -> Tensor:
    """The head's product with a state [H], and its bias where it has one."""
    head = tiny.frozen.lm_head.double()
    out = head[:, :HIDDEN] @ state
    return out + head[:, HIDDEN] if tiny.frozen.has_bias else out


def target_probs(tiny: Tiny, final: Tensor) -> Tensor:
    """What the target draws from behind a final state [H]."""
    out = head_logits(tiny, final.double()) * tiny.frozen.head_scale
    cap = tiny.frozen.softcap
    out = out if cap is None else cap * torch.tanh(out / cap)
    return out.exp() / out.exp().sum()


def chain(
    model: DSparkModel, tiny: Tiny, states: Tensor, before: list[int]
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
        logits.append(head_logits(tiny, state) + p["markov_head.markov_w2.weight"] @ latent)
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
    samples: Callable[..., list[Sample]] = make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = make_context
    captured: Callable[..., TargetCapture] = captured
    model64: Callable[[Tiny], DSparkModel] = model64
    block_states: Callable[..., Tensor] = block_states
    target_probs: Callable[..., Tensor] = target_probs
    chain: Callable[..., tuple[list[Tensor], list[Tensor]]] = chain


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
