"""A tiny draft around random target tensors, and the lattice written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specforge_lilicorr import extend
from specforge_lilicorr.config import LiLiCorrConfig
from torch import Tensor

from specforge_core.types import Batch, Sample, StepContext, TargetCapture

from ... import dflash_kit as dflash
from ...dflash_kit import Tiny

VOCAB = 13
OPTIONS: dict[str, Any] = {
    "name": "lilicorr",
    "num_layers": 2,
    "block_size": 4,
    "mask_token_id": VOCAB - 1,
    "candidate_top_k": 6,
    "lattice_hidden_size": 16,
    "lattice_heads": 2,
    "lattice_mlp_ratio": 1.5,
    "factor_dim": 6,
    "logit_scale": 3.0,
}


def make_tiny(
    softcap: float | None = None,
    scale: float = 1.0,
    head_scale: float = 1.0,
    bias: bool = False,
    *,
    fresh: bool = False,
    **options: Any,
) -> Tiny:
    """A draft whose weights are not its first ones, unless `fresh`."""
    config = LiLiCorrConfig.model_validate({**OPTIONS, **options})

    def vary(name: str) -> float:
        varied = any(part in name for part in ("conv", "norm", "lilicorr"))
        return 0.3 if varied and not fresh else 0.0

    return dflash.make_tiny(
        config,
        lambda plain: extend(config, plain),
        vary,
        vocab=VOCAB,
        softcap=softcap,
        scale=scale,
        head_scale=head_scale,
        bias=bias,
    )


def make_batch(config: LiLiCorrConfig, samples: list[Sample]) -> Batch:
    return dflash.make_batch(config, samples, vocab=VOCAB)


def make_samples(lengths: tuple[int, ...] = (19, 11, 7), seed: int = 2) -> list[Sample]:
    """A block may start where nothing is before it."""
    return dflash.make_samples(lengths, seed, vocab=VOCAB, share=0.8, sure=slice(5))


# ---- the method, one block and one candidate at a time, in float64 ----------

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """What one block comes to: every slot's log-probabilities, candidates and their vectors."""

    log_probs: Tensor  # [D, V]
    ids: list[list[int]]  # D times K, likeliest first
    anchor: Tensor  # [f]
    outs: list[list[Tensor]]  # D times K times [f]
    ins: list[list[Tensor]]
    scale: float

    def scores(self, slot: int, before: int | None) -> Tensor:
        """Scores [K] of a slot behind the candidate `before` of the slot before it."""
        known = self.anchor if before is None else self.outs[slot - 1][before]
        return torch.stack([self.scale * (known * x).sum() for x in self.ins[slot]])


def model64(tiny: Tiny) -> Any:
    return deepcopy(tiny.model).double()


def head_logits(tiny: Tiny, state: Tensor, scale: float = 1.0) -> Tensor:
    return dflash.capped(dflash.head_product(tiny, state) * scale, tiny.frozen.softcap)


def target_logits(tiny: Tiny, final: Tensor) -> Tensor:
    return head_logits(tiny, final.double(), tiny.frozen.beside.scale)


def make_block(model: Any, tiny: Tiny, features: Tensor, token: int, anchor: int) -> Block:
    """The block that starts with `token` at `anchor`, behind `features` of the text."""
    config, features = tiny.config, features.double()
    embed = tiny.frozen.embed_tokens.double() * tiny.frozen.scale
    states = dflash.block_states(model, tiny, features, token, anchor)[1:]
    log_probs = torch.stack([head_logits(tiny, s).log_softmax(0) for s in states])
    ids = [row.argsort(descending=True)[: config.candidate_top_k].tolist() for row in log_probs]
    p = {n.removeprefix("lilicorr."): w for n, w in model.named_parameters()}
    rows = []
    for slot, found in enumerate(ids):
        for rank, token in enumerate(found):
            row = (
                linear(p, "token_proj", embed[token]) if "token_proj.weight" in p else embed[token]
            )
            row = row + linear(p, "pass_hidden_proj", states[slot])
            row = row + described(p, log_probs[slot], found, rank)
            row = row + p["slot_embedding"][0, 0, slot, 0] + p["rank_embedding"][0, 0, 0, rank]
            rows.append(row)
    x = torch.stack(rows)
    place = [slot for slot in range(len(ids)) for _ in ids[slot]]
    for i in range(config.lattice_layers):
        x = layer({n.removeprefix(f"layers.{i}."): w for n, w in p.items()}, p, x, place)
    x = norm(x, p["output_norm.weight"])
    known = torch.zeros(x.shape[1], dtype=torch.float64)
    if anchor:
        context = model.backbone.fc.weight @ features[anchor - 1]
        known = linear(p, "context_proj", norm(context, model.backbone.hidden_norm.weight))
    known = norm(known, p["anchor_norm.weight"])
    joined = torch.cat([x, known.expand_as(x), x * known], dim=1)
    factors = torch.nn.functional.silu(linear(p, "factor_input_proj", joined))
    sizes = [len(found) for found in ids]
    outs, ins = (unit(config, linear(p, n, factors)).split(sizes) for n in ("out_head", "in_head"))
    return Block(
        log_probs,
        ids,
        unit(config, linear(p, "anchor_out_head", known)),
        [list(x) for x in outs],
        [list(x) for x in ins],
        config.logit_scale,
    )


def described(p: Weights, log_probs: Tensor, ids: list[int], rank: int) -> Tensor:
    own, best = log_probs[ids[rank]], log_probs[ids[0]]
    numbers = torch.tensor([rank / (len(ids) - 1), float(rank == 0)], dtype=torch.float64)
    x = torch.cat([torch.stack([own, own.exp(), own - best]), numbers])
    x = (x - x.mean()) / ((x - x.mean()).pow(2).mean() + 1e-5).sqrt()
    x = x * p["feature_norm.weight"] + p["feature_norm.bias"]
    x = torch.nn.functional.silu(linear(p, "feature_mlp.up_proj", x))
    return linear(p, "feature_mlp.down_proj", x)


def layer(own: Weights, p: Weights, x: Tensor, place: list[int]) -> Tensor:
    h = norm(x, own["attn_norm.weight"])
    q, k, v = (h @ own["attn.in_proj_weight"].t() + own["attn.in_proj_bias"]).chunk(3, dim=1)
    heads, count = [], len(p["same_slot_bias"])
    apart = torch.tensor([[i - j for j in place] for i in place])
    size, farthest = x.shape[1] // count, p["relative_slot_bias"].shape[1] // 2
    for head in range(count):
        part = slice(head * size, head * size + size)
        bias = p["relative_slot_bias"][head, apart + farthest]
        bias = bias + p["same_slot_bias"][head] * (apart == 0)
        scores = q[:, part] @ k[:, part].t() / math.sqrt(size)
        heads.append((scores + bias).softmax(1) @ v[:, part])
    x = x + linear(own, "attn.out_proj", torch.cat(heads, dim=1))
    h = norm(x, own["mlp_norm.weight"])
    h = torch.nn.functional.silu(linear(own, "mlp.up_proj", h))
    return x + linear(own, "mlp.down_proj", h)


def linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].t() + p[f"{name}.bias"]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def unit(config: LiLiCorrConfig, x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=config.vector_eps)


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[Sample]] = make_samples
    batch: Callable[..., Batch] = make_batch
    context: Callable[..., StepContext] = dflash.make_context
    captured: Callable[..., TargetCapture] = dflash.captured
    model64: Callable[[Tiny], Any] = model64
    block: Callable[..., Block] = make_block
    target_logits: Callable[..., Tensor] = target_logits


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
