"""The method written out plainly in float64: one row at a time, one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from specforge_eagle3 import Eagle3Config
from specforge_eagle3.frozen import Frozen
from specforge_eagle3.model import Eagle3Model
from torch import Tensor

from specforge_core.types import Draft, TargetInfo

EPS = 1e-6


@dataclass(frozen=True)
class Tiny:
    config: Eagle3Config
    target: TargetInfo
    draft: Draft
    head: Tensor  # [V, H], of the target

    @property
    def model(self) -> Eagle3Model:
        assert isinstance(self.draft.model, Eagle3Model)
        return self.draft.model

    @property
    def frozen(self) -> Frozen:
        assert isinstance(self.draft.frozen, Frozen)
        return self.draft.frozen


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rope(x: Tensor, position: int, theta: float = 1000.0) -> Tensor:
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (position * freq).cos(), (position * freq).sin()
    return torch.cat([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def sample_states(
    w: dict[str, Tensor], tiny: Tiny, sample: dict[str, Tensor], steps: int
) -> list[dict[int, Tensor]]:
    """[step][row] -> normed state [H], of the rows whose embedding exists, in float64."""
    shape = tiny.model.shape
    d, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    length = len(sample["input_ids"])
    embed = tiny.frozen.embed_tokens.double()[sample["input_ids"]]
    feature = {}
    for t in range(length):
        parts = sample["hidden_states"][t].double().view(3, -1)
        if shape.fc_norm:
            parts = torch.stack([norm(p, w[f"fc_norm.{j}.weight"]) for j, p in enumerate(parts)])
        feature[t] = w["fc.weight"] @ parts.flatten()
    keys: list[dict[int, list[Tensor]]] = []
    values: list[dict[int, list[Tensor]]] = []
    out = []
    for i in range(steps):
        rows = [t for t in range(length) if t + 1 + i < length]
        x = {
            t: torch.cat(
                [
                    norm(embed[t + 1 + i], w["before.input_layernorm.weight"]),
                    norm(feature[t], w["before.hidden_norm.weight"]),
                ]
            )
            for t in rows
        }

        def heads(name: str, count: int, t: int, rotated: bool) -> list[Tensor]:
            parts = (w[f"before.{name}_proj.weight"] @ x[t]).view(count, d).unbind()  # noqa: B023
            if rotated and shape.qk_norm:
                parts = [norm(p, w[f"before.{name}_norm.weight"]) for p in parts]
            return [rope(p, t + i) for p in parts] if rotated else list(parts)  # noqa: B023

        keys.append({t: heads("k", shape.num_kv_heads, t, True) for t in rows})
        values.append({t: heads("v", shape.num_kv_heads, t, False) for t in rows})
        states, fed = {}, {}
        for t in rows:
            queries = heads("q", shape.num_heads, t, True)
            seen = [(0, s) for s in range(t + 1)] + [(j, t) for j in range(1, i + 1)]
            mixed = []
            for head, query in enumerate(queries):
                kv = head // group
                scores = torch.stack([query @ keys[j][s][kv] for j, s in seen]) / math.sqrt(d)
                weights = scores.softmax(0)
                mixed.append(
                    sum(p * values[j][s][kv] for p, (j, s) in zip(weights, seen, strict=True))
                )
            hidden = feature[t] + w["after.o_proj.weight"] @ torch.cat(mixed)  # type: ignore[arg-type]
            y = norm(hidden, w["after.post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(w["after.gate_proj.weight"] @ y)
            hidden = hidden + w["after.down_proj.weight"] @ (gate * (w["after.up_proj.weight"] @ y))
            states[t] = norm(hidden, w["after.norm.weight"])
            fed[t] = states[t] if shape.norm_output else hidden
        feature = fed
        out.append(states)
    return out


@dataclass
class Exact:
    """What the formulas give for a list of samples."""

    loss: Tensor  # divided
    hits: list[list[bool]]  # [step] of each trained row
    overlaps: list[float]
    lengths: list[int]  # 1 + joint hits of each row whose last and first drafted token are kept


def label_scores(tiny: Tiny, tokens: list[int], final: Tensor) -> Tensor:
    """Return what the teacher's head makes of a final state [H], for these tokens."""
    scores, softcap = tiny.head.double()[tokens] @ final.double(), tiny.model.shape.softcap
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def row_loss(tiny: Tiny, p: Tensor, q: Tensor, overlap: Tensor) -> Tensor:
    """Return the loss of one row of distributions p and q [Vd]."""
    config = tiny.config
    mix = config.lk_scale * torch.exp(-config.lk_decay * overlap.detach())
    return {
        "kl": -(p * q.log()).sum(),
        "lk_alpha": -overlap.log(),
        "lk_lambda": mix * (p * (p / q).log()).sum() + (1 - mix) * (1 - overlap),
    }[config.loss]


def objective(
    w: dict[str, Tensor],
    tiny: Tiny,
    samples: list[dict[str, Tensor]],
    steps: int | None = None,
    hard: Any = lambda sample: (),
) -> Exact:
    """Section by section; `hard` says which labels of a sample add nothing to the loss."""
    config = tiny.config
    steps = steps or config.steps
    tokens = (tiny.model.d2t + torch.arange(len(tiny.model.d2t))).tolist()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(steps)]
    counts = [0] * steps
    hits: list[list[bool]] = [[] for _ in range(steps)]
    overlaps, lengths = [], []
    for sample in samples:
        states, left_out = sample_states(w, tiny, sample, steps), hard(sample)
        mask, choice = sample["loss_mask"].tolist(), sample["target_argmax"].tolist()
        length = len(mask)

        def is_answer(u: int) -> bool:
            return u < length and bool(mask[u])  # noqa: B023

        alive, joint = dict[int, bool](), dict[int, int]()
        for i in range(steps):
            for t in states[i]:
                looked = {"feature": t + i, "input": t + 1 + i, "label": t + 2 + i}[config.mask_on]
                supervised = looked < length and bool(mask[looked])
                kept = is_answer(t + 2 + i)
                if i == 0 and supervised and kept and is_answer(t + 1):
                    alive[t], joint[t] = True, 0
                u = t + 1 + i
                hit = False
                if supervised and choice[u] in tokens:
                    scores = label_scores(tiny, tokens, sample["final"][u])
                    p = scores.softmax(-1)
                    drawn = (scores - sample["target_logsumexp"][u].double()).exp()
                    logits = w["lm_head.weight"] @ states[i][t]
                    q = logits.softmax(-1)
                    a = torch.minimum(drawn, q).sum()
                    if u not in left_out:
                        sums[i] = sums[i] + row_loss(tiny, p, q, a)
                        counts[i] += 1
                    hit = tokens[int(logits.argmax())] == choice[u]
                    hits[i].append(hit)
                    overlaps.append(float(a.detach()))
                if t in alive:
                    alive[t] = alive[t] and hit and kept and i < config.draft_length
                    joint[t] += alive[t]
        lengths += [1 + n for n in joint.values()]
    decays = [config.step_decay**i for i in range(steps)]
    total = sum((g * s for g, s in zip(decays, sums, strict=True)), torch.zeros(()))
    if config.mean_over == "positions":
        total = total / sum(len(s["input_ids"]) for s in samples)
    else:
        weight = sum(g * n for g, n in zip(decays, counts, strict=True))
        total = total * sum(decays) / weight
    return Exact(total, hits, overlaps, lengths)
