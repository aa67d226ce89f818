"""A tiny draft around random target tensors, and the method written out plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from specforge_dflash import (
    DFlashOptions,
    build_draft,
    specforge_adapter,
    specforge_collate,
    specforge_transform,
)
from specforge_dflash.export import export_draft
from specforge_dflash.model import DFlashModel, Frozen
from torch import Tensor

from specforge_core.draws import draws_of
from specforge_core.target.head import Head
from specforge_core.target.measure import HeadScale
from specforge_core.types import Batch, CaptureSpec, Draft, Export, Sample, StepContext, TargetInfo

from ... import dflash_kit

VOCAB, HIDDEN, LAYERS = 41, 24, 8
MASK = 40
ROPE = {**dflash_kit.TARGET_CONFIG["rope_parameters"], "partial_rotary_factor": 0.5}
TARGET_CONFIG: dict[str, Any] = {**dflash_kit.TARGET_CONFIG, "rope_parameters": ROPE}


@dataclass(frozen=True)
class Tiny:
    config: DFlashOptions
    target: TargetInfo
    draft: Draft

    @property
    def model(self) -> DFlashModel:
        assert isinstance(self.draft.model, DFlashModel)
        return self.draft.model

    @property
    def frozen(self) -> Frozen:
        assert isinstance(self.draft.frozen, Frozen)
        return self.draft.frozen


def make_config(**options: Any) -> DFlashOptions:
    defaults: dict[str, Any] = {"name": "dflash", "num_layers": 2, "block_size": 4}
    return DFlashOptions.model_validate({**defaults, "mask_token_id": MASK, **options})


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
    softcap: float | None = None,
    scale: float = 1.0,
    bias: bool = False,
    model_type: str = "tiny",
    beside: HeadScale | None = None,
    **options: Any,
) -> Tiny:
    config = make_config(**options)
    target = make_target(final_logit_softcapping=softcap, model_type=model_type)
    gen = torch.Generator().manual_seed(1)
    embed = torch.randn(VOCAB, HIDDEN, generator=gen)
    head = torch.randn(VOCAB, HIDDEN, generator=gen)
    if bias:
        head = Head(weight=head, bias=torch.randn(VOCAB, generator=gen)).joined()
    draft = build_draft(config, target, embed, head, scale=scale, beside=beside, mask_token_id=MASK)
    for name, weight in draft.model.named_parameters():  # norms of ones would hide their order
        if "norm" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=gen)
    return Tiny(config, target, draft)


def make_samples(
    lengths: tuple[int, ...] = (19, 11), layers: int = 2, seed: int = 2
) -> list[Sample]:
    """Ragged samples; part of each is supervised."""
    gen = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        mask = (torch.rand(length, generator=gen) < 0.7).to(torch.uint8)
        mask[3:5] = 1
        ids = torch.randint(1, MASK, (length,), generator=gen)
        features = torch.randn(length, layers * HIDDEN, generator=gen)
        samples.append({"input_ids": ids, "loss_mask": mask, "hidden_states": features})
    return samples


def make_taught(lengths: tuple[int, ...] = (19, 11)) -> list[Sample]:
    """Return such samples with what the target says of each position besides."""
    samples, gen = make_samples(lengths), torch.Generator().manual_seed(3)
    for sample in samples:
        length = len(sample["input_ids"])
        sample["target_argmax"] = torch.randint(VOCAB, (length,), generator=gen)
        sample["final"] = torch.randn(length, HIDDEN, generator=gen)
    return samples


def make_batch(config: DFlashOptions, samples: list[Sample], epoch: int = 0) -> Batch:
    """What the loader makes of samples: transform, then collate."""
    drawn = draw(config, samples, epoch)
    return specforge_collate(config, make_spec(config), any_draft())(drawn)


def draw(config: DFlashOptions, samples: list[Sample], epoch: int = 0) -> list[Sample]:
    """Transform what the strategy stores of samples."""
    spec = make_spec(config)
    transform = specforge_transform(config, spec, 10**6)
    stored = [{name: sample[name] for name in spec.fields} for sample in samples]
    drawn = [transform(s, draws_of(0, epoch, i)) for i, s in enumerate(stored)]
    return [s for s in drawn if s is not None]


@cache
def any_draft() -> Draft:
    """Collate asks it for nothing but the mask token."""
    return make_tiny().draft


def make_spec(config: DFlashOptions) -> CaptureSpec:
    """What the strategy stores, of the layers that the samples have."""
    config = config.model_copy(update={"layers": (1, 5)})
    return specforge_adapter(config, make_target()).spec


def make_context() -> StepContext:
    mesh: Any = None
    generator = torch.Generator().manual_seed(0)
    return StepContext(step=0, total_steps=1, generator=generator, training=True, mesh=mesh)


# ---- the method, one block at a time, one head at a time -------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rope(x: Tensor, positions: Tensor, theta: float = 1000.0) -> Tensor:
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat(
        [x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], -1
    )


def block_states(
    weights: dict[str, Tensor], tiny: Tiny, features: Tensor, slots: Tensor, anchor: int
) -> Tensor:
    """Final states [B, H] of one block with inputs `slots` [B, H], in float64."""
    shape = tiny.model.shape
    block, d = shape.block_size, shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    context = norm(features[:anchor] @ weights["fc.weight"].t(), weights["hidden_norm.weight"])
    positions = torch.arange(anchor + block)
    x = slots
    for i in range(shape.num_layers):
        p = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items()}
        h = norm(x, p["input_layernorm.weight"])
        both = torch.cat([context, h])
        window = shape.sliding_window if shape.layer_types[i] == "sliding_attention" else None
        heads = []
        for head in range(shape.num_heads):
            q_rows = slice(head * d, head * d + d)
            kv_rows = slice(head // group * d, head // group * d + d)
            q = norm(h @ p["self_attn.q_proj.weight"][q_rows].t(), p["self_attn.q_norm.weight"])
            k = norm(both @ p["self_attn.k_proj.weight"][kv_rows].t(), p["self_attn.k_norm.weight"])
            v = both @ p["self_attn.v_proj.weight"][kv_rows].t()
            scores = rope(q, positions[anchor:]) @ rope(k, positions).t() / math.sqrt(d)
            back = positions[anchor:, None] - positions
            if window is not None or tiny.config.causal:
                scores = scores.masked_fill(back < 0, float("-inf"))
            if window is not None:
                scores = scores.masked_fill(back >= window, float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ p["self_attn.o_proj.weight"].t()
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(h @ p["mlp.gate_proj.weight"].t())
        x = x + (gate * (h @ p["mlp.up_proj.weight"].t())) @ p["mlp.down_proj.weight"].t()
    return norm(x, weights["norm.weight"])


def block_logits(
    weights: dict[str, Tensor], tiny: Tiny, features: Tensor, known: int | list[int], anchor: int
) -> Tensor:
    """Logits [B, V] of the block that starts with the tokens `known` at `anchor`, in float64."""
    ids = torch.full((tiny.config.block_size,), MASK)
    known = [known] if isinstance(known, int) else known
    ids[: len(known)] = torch.tensor(known)
    slots = tiny.frozen.embed_tokens.double()[ids] * tiny.frozen.scale
    states = block_states(weights, tiny, features.double(), slots, anchor)
    logits = tiny.frozen.states(states) @ tiny.frozen.lm_head.double().t()
    cap = tiny.frozen.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def weights64(tiny: Tiny) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in tiny.model.named_parameters()}


def export_of(tiny: Tiny, format: str = "hf") -> Export:
    made = export_draft(tiny.config, tiny.draft, tiny.target, format)
    assert made is not None
    return made


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., DFlashOptions] = make_config
    target: Callable[..., TargetInfo] = make_target
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = make_samples
    taught: Callable[..., list[Sample]] = make_taught
    spec: Callable[[DFlashOptions], CaptureSpec] = make_spec
    draw: Callable[..., list[Sample]] = draw
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = make_context
    logits64: Callable[..., Tensor] = block_logits
    weights64: Callable[[Tiny], dict[str, Tensor]] = weights64
    export: Callable[..., Export] = export_of


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
