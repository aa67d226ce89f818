"""A tiny draft around random target tensors, and the method written out plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from specforge_eagle3.adapter import trained_labels
from specforge_eagle3.vocab import offsets
from specforge_peagle import build_draft
from specforge_peagle.config import PeagleConfig
from specforge_peagle.elements import ALL_FIELDS, draw_depths, find_elements
from specforge_peagle.model import PeagleModel
from torch import Tensor

from specforge_core.batches.collate import pack
from specforge_core.types import Batch, Draft, StepContext, TargetCapture, TargetInfo

VOCAB, DRAFT_VOCAB, HIDDEN, MASK, EPS = 29, 17, 24, 28, 1e-6
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


@dataclass(frozen=True)
class Tiny:
    config: PeagleConfig
    target: TargetInfo
    draft: Draft
    embed: Tensor  # [V, H], of the target
    head: Tensor  # [V, H], of the target

    @property
    def model(self) -> PeagleModel:
        assert isinstance(self.draft.model, PeagleModel)
        return self.draft.model

    @property
    def frozen(self) -> Any:
        return self.draft.frozen


def make_config(**options: Any) -> PeagleConfig:
    defaults = {"name": "peagle", "num_layers": 2, "depths": 4, "mask_token_id": MASK}
    small = {"draft_vocab_size": DRAFT_VOCAB, "keep_least": 0.3}
    return PeagleConfig.model_validate({**defaults, **small, **options})


def make_target(**overrides: Any) -> TargetInfo:
    return TargetInfo(
        name_or_path="tiny",
        revision=None,
        hidden_size=HIDDEN,
        num_layers=8,
        vocab_size=VOCAB,
        config={**TARGET_CONFIG, **overrides},
    )


def target_tensors() -> tuple[Tensor, Tensor, torch.Generator]:
    """Return the tiny target's embedding and head, both [V, H], and a generator for the rest."""
    gen = torch.Generator().manual_seed(1)
    embed = torch.randn(VOCAB, HIDDEN, generator=gen)
    return embed, torch.randn(VOCAB, HIDDEN, generator=gen) * 0.5, gen


def make_tiny(softcap: float | None = None, **options: Any) -> Tiny:
    config, target = make_config(**options), make_target(final_logit_softcapping=softcap)
    embed, head, gen = target_tensors()
    size = VOCAB if config.draft_vocab_size == "full" else DRAFT_VOCAB
    tokens = torch.randperm(VOCAB, generator=gen)[:size].sort().values
    draft = build_draft(config, target, (embed, lambda: head, offsets(tokens)))
    with torch.no_grad():
        for name, weight in draft.model.named_parameters():
            if "norm" in name:  # norms of ones would hide their order
                weight += 0.3 * torch.randn(weight.shape, generator=gen)
            if name in ("lm_head.weight", "embed_tokens.weight"):  # trained away from the target's
                weight += 0.2 * torch.randn(weight.shape, generator=gen)
    return Tiny(config, target, draft, embed, head)


def make_samples(
    config: PeagleConfig,
    lengths: tuple[int, ...] = (13, 9, 5),
    seed: int = 2,
    softcap: float | None = None,
) -> list[dict[str, Tensor]]:
    """Ragged samples, transformed; part of each is supervised, part cannot be drafted."""
    gen = torch.Generator().manual_seed(seed)
    head, samples = target_tensors()[1].double(), []
    for length in lengths:
        mask = (torch.rand(length, generator=gen) < 0.8).to(torch.uint8)
        mask[2:4] = 1
        final = torch.randn(length, HIDDEN, generator=gen)
        scores = final.double() @ head.t()
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        drawn = draw_depths(config, trained_labels(mask, config.mask_on), gen)
        samples.append(
            {
                "input_ids": torch.randint(VOCAB - 1, (length,), generator=gen),
                "loss_mask": mask,
                "hidden_states": torch.randn(length, 3 * HIDDEN, generator=gen),
                "final": final,
                "target_argmax": torch.randint(VOCAB, (length,), generator=gen),
                "target_logsumexp": scores.logsumexp(-1).float(),
                **drawn,
            }
        )
    return samples


def make_batch(tiny: Tiny, samples: list[dict[str, Tensor]], arrange: Any = pack) -> Batch:
    """Return what the strategy's collate makes of samples, packed or padded before."""
    batch = arrange(samples, ALL_FIELDS)
    return find_elements(tiny.model.t2d.cpu(), tiny.config, MASK, batch)


def make_capture(sample: dict[str, Tensor], start: int, end: int) -> TargetCapture:
    states = sample["hidden_states"][start:end].view(end - start, 3, HIDDEN).unbind(1)
    ids = sample["input_ids"][start:end]
    layers = dict(zip((1, 3, 4), states, strict=True))
    return TargetCapture(
        index=0, input_ids=ids, loss_mask=torch.ones_like(ids), hidden_states=layers
    )


def make_context() -> StepContext:
    alone: Any = {"step": 0, "total_steps": 1, "training": True, "mesh": None}
    return StepContext(generator=torch.Generator(), **alone)


# ---- the method, from its formulas -----------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rope(x: Tensor, position: int) -> Tensor:
    """Rotate heads [h, d] by halves."""
    half = x.shape[-1] // 2
    angle = position * 1000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    left, right = x[:, :half], x[:, half:]
    turned = left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()
    return torch.cat(turned, dim=-1)


def logits64(
    w: dict[str, Tensor], tiny: Tiny, sample: dict[str, Tensor], wanted: list[tuple[int, int]]
) -> dict[tuple[int, int], Tensor]:
    """(row, depth) -> draft logits [Vd], of these elements and all rows at depth 0."""
    shape, ids = tiny.model.shape, sample["input_ids"].tolist()
    table = w["embed_tokens.weight"] if "embed_tokens.weight" in w else tiny.embed.double()
    places = [(a, 0) for a in range(len(ids) - 1)] + [p for p in wanted if p[1]]
    states, embeds = [], []
    for a, d in places:
        captured = w["mask_hidden"] if d else sample["hidden_states"][a].double()
        states.append(w["fc.weight"] @ captured)
        embeds.append(table[MASK if d else ids[a + 1]])
    for layer in range(shape.num_layers):
        name = f"layers.{layer}"
        queries, keys, values = [], [], []
        for i, (a, d) in enumerate(places):
            weight = w[f"{name}.before.input_layernorm.weight"]
            if layer == 0:
                feature = norm(states[i], w[f"{name}.before.hidden_norm.weight"])
                x = torch.cat([norm(embeds[i], weight), feature])
            else:
                x = norm(states[i], weight)
            q, k, v = (
                (w[f"{name}.before.{part}_proj.weight"] @ x).view(-1, shape.head_dim)
                for part in "qkv"
            )
            if shape.qk_norm:
                q = norm(q, w[f"{name}.before.q_norm.weight"])
                k = norm(k, w[f"{name}.before.k_norm.weight"])
            queries.append(rope(q, a + d))
            keys.append(rope(k, a + d))
            values.append(v)
        after = []
        for i, (a, d) in enumerate(places):
            seen = [
                j for j, (b, e) in enumerate(places) if (e == 0 and b <= a) or (b == a and e <= d)
            ]
            group, mixed = shape.num_heads // shape.num_kv_heads, []
            for head in range(shape.num_heads):
                k = torch.stack([keys[j][head // group] for j in seen])
                v = torch.stack([values[j][head // group] for j in seen])
                scores = k @ queries[i][head] / math.sqrt(shape.head_dim)
                mixed.append(scores.softmax(0) @ v)
            x = states[i] + w[f"{name}.after.o_proj.weight"] @ torch.cat(mixed)
            y = norm(x, w[f"{name}.after.post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(w[f"{name}.after.gate_proj.weight"] @ y)
            up = w[f"{name}.after.up_proj.weight"] @ y
            after.append(x + w[f"{name}.after.down_proj.weight"] @ (gate * up))
        states = after
    return {
        place: w["lm_head.weight"] @ norm(state, w["norm.weight"])
        for place, state in zip(places, states, strict=True)
    }


@dataclass
class Exact:
    """What the formulas give for a list of samples."""

    loss: Tensor  # summed
    count: int
    supervised: int
    hits: list[list[bool]]  # [depth] of each trained element
    overlaps: list[float]
    lengths: list[int]  # of each whole row that a draft starts from


def objective(w: dict[str, Tensor], tiny: Tiny, samples: list[dict[str, Tensor]]) -> Exact:
    """Element by element: mask, teacher, loss; then what each row would get accepted."""
    config, softcap = tiny.config, tiny.model.shape.softcap
    tokens = (tiny.model.d2t + torch.arange(len(tiny.model.d2t))).tolist()
    none, hits = torch.zeros((), dtype=torch.float64), [[] for _ in range(config.depths)]
    out = Exact(none, 0, 0, hits, [], [])
    for sample in samples:
        mask, choice = sample["loss_mask"].tolist(), sample["target_argmax"].tolist()
        length, depths = len(mask), sample["depths"].tolist()
        places = [(a, d) for a in range(length - 1) for d in range(depths[a] + 1)]
        found = logits64(w, tiny, sample, places)
        right = {}
        for a, d in places:
            u = a + 1 + d
            looked = {"feature": u - 1, "input": u, "label": u + 1}[config.mask_on]
            if looked >= length or not mask[looked]:
                assert d == 0
                continue
            out.supervised += 1
            if choice[u] not in tokens:
                continue
            scores = tiny.head.double()[tokens] @ sample["final"][u].double()
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            p, q = scores.softmax(-1), found[a, d].softmax(-1)
            drawn = (scores - sample["target_logsumexp"][u].double()).exp()
            overlap = torch.minimum(drawn, q).sum()
            mix = config.lk_scale * torch.exp(-config.lk_decay * overlap.detach())
            out.loss = (
                out.loss
                + {
                    "kl": -(p * q.log()).sum(),
                    "lk_alpha": -overlap.log(),
                    "lk_lambda": mix * (p * (p / q).log()).sum() + (1 - mix) * (1 - overlap),
                }[config.loss]
            )
            out.count += 1
            out.overlaps.append(float(overlap.detach()))
            hit = tokens[int(found[a, d].argmax())] == choice[u]
            out.hits[d].append(hit)
            right[a, d] = hit and u + 1 < length and bool(mask[u + 1])
        for a in range(length - 2):
            looked = {"feature": a, "input": a + 1, "label": a + 2}[config.mask_on]
            if not (sample["whole"][a] and mask[looked] and mask[a + 1] and mask[a + 2]):
                continue
            joint = [right.get((a, d), False) for d in range(config.draft_tokens)]
            out.lengths.append(1 + [*joint, False].index(False))
    return out


def weights64(tiny: Tiny) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in tiny.model.named_parameters()}


@dataclass(frozen=True)
class Kit:
    """The functions above, for tests."""

    config: Callable[..., PeagleConfig] = make_config
    target: Callable[..., TargetInfo] = make_target
    tiny: Callable[..., Tiny] = make_tiny
    samples: Callable[..., list[dict[str, Tensor]]] = make_samples
    batch: Callable[..., Batch] = make_batch
    capture: Callable[..., TargetCapture] = make_capture
    context: Callable[..., StepContext] = make_context
    logits64: Callable[..., dict[tuple[int, int], Tensor]] = logits64
    objective64: Callable[..., Exact] = objective
    weights64: Callable[[Tiny], dict[str, Tensor]] = weights64


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
