"""The objective against the formulas written out in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from specforge_dflash import build_draft
from specforge_dflash.step import DFlashStep
from specforge_lilicorr import specforge_adapter
from specforge_lilicorr.config import LiLiCorrConfig
from specforge_lilicorr.step import LiLiCorrStep
from torch import Tensor

from specforge_core.errors import ConfigError
from specforge_core.testing.close import close
from specforge_core.types import StepOutput

from ...dflash_kit import slot_weights

# what fc, two layers of the backbone and two of the lattice sum over, both heads, and a batch
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23) + 2 * (4 * 24 + 36) + 3 * 24 + 24 + 13 + 300

Samples = list[dict[str, Tensor]]
CASES: list[dict[str, Any]] = [
    {},
    {"batches": "padded"},
    {"ce_weight": 0.125, "margin_weight": 0.125, "margin": 1.5, "block_size": 3},
    {"ce_weight": 0.0, "penalty_weight": 0.5, "softcap": 5.0, "head_scale": 0.7},
    {"penalty_weight": 0.0, "scale": 2.0, "bias": True, "candidate_top_k": 13},
    {"lattice_hidden_size": 0, "lattice_heads": 3, "bias": True, "vector_eps": 3.0},
    {"conv_kernel_size": 2, "conv_group_size": 6, "lattice_layers": 1, "candidate_top_k": 9},
    {"weighting": "dpace", "sliding_window": 5, "block_size": 5},
    {"weighting": "uniform", "logit_scale": 8.0},
    {"decay_gamma": 1.5, "lattice_mlp_ratio": 2.0, "factor_dim": 4},
    {"weighting": "dpace_confidence", "dpace_alpha": 0.3},
    {"weighting": "dpace_continuation"},
]


@dataclass
class Sums:
    """Of all blocks."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    weight: float = 0.0
    blocks: int = 0
    slots: int = 0
    trained: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("path", "base", "any"), 0))
    lengths: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("path", "base", "any"), 0)
    )


def reference(kit: Any, tiny: Any, model: Any, samples: Samples) -> Sums:
    """Every possible anchor is taken."""
    sums = Sums()
    for sample in samples:
        ids, mask = sample["input_ids"], sample["loss_mask"].tolist() + [0] * 99
        for a in range(len(ids) - 1):
            if mask[a] and mask[a + 1]:
                add(kit, tiny, kit.block(model, tiny, sample["hidden_states"], int(ids[a]), a),
                    sample, a, mask, sums)  # fmt: skip
    return sums


def add(
    kit: Any, tiny: Any, block: Any, sample: dict[str, Tensor], a: int, mask: list[int], sums: Sums
) -> None:
    config, ids = tiny.config, sample["input_ids"].tolist()
    taught = [bool(mask[a + 1 + k]) for k in range(config.block_size - 1)]
    costs = [-float(row[ids[a + 1 + k]].detach()) if taught[k] else None
             for k, row in enumerate(block.log_probs)]  # fmt: skip
    weights = slot_weights(config, config.gamma, costs)
    mean = sum(math.exp(-k / config.gamma) for k in range(len(taught))) / len(taught)
    share = mean if config.weighting == "decay" else 1.0
    alive, going, before = True, {"path": True, "base": True, "any": True}, None
    sums.blocks += 1
    for name in going:
        sums.lengths[name] += 1
    for k, supervised in enumerate(taught):
        if not supervised:
            alive, going = False, dict.fromkeys(going, False)
            continue
        label, found = ids[a + 1 + k], block.ids[k]
        sums.loss = sums.loss - weights[k] * block.log_probs[k, label]
        sums.weight += weights[k] if config.weighting == "decay" else 1
        sums.slots += 1
        hits = {"path": False, "base": found[0] == label, "any": label in found}
        alive = alive and hits["any"]
        if alive:
            scores, gold = block.scores(k, before), found.index(label)
            before = gold
            hits["path"] = int(scores.argmax()) == gold
            if all(taught):
                sums.trained += 1
                sums.loss = sums.loss + share * terms(kit, tiny, scores, gold, found, sample, a + k)
        for name, hit in hits.items():
            going[name] = going[name] and hit
            sums.hits[name] += hit
            sums.lengths[name] += going[name]


def terms(
    kit: Any, tiny: Any, scores: Tensor, gold: int, found: list[int], sample: Any, before: int
) -> Tensor:
    config = tiny.config
    probs = scores.exp() / scores.exp().sum()
    loss = -config.ce_weight * probs[gold].log()
    others = torch.stack([s for j, s in enumerate(scores) if j != gold]).max()
    loss = loss + config.margin_weight * (config.margin - scores[gold] + others).clamp(min=0)
    if config.penalty_weight:
        logits = kit.target_logits(tiny, sample["final"][before])[found]
        for j in range(len(found)):
            gap = (logits[gold] - logits[j]).clamp(min=0)
            loss = loss + config.penalty_weight * probs[j] * gap
    return loss


def run(kit: Any, tiny: Any, samples: Samples) -> tuple[StepOutput, dict[str, Tensor]]:
    """The step's output and the gradients."""
    out = LiLiCorrStep(tiny.config)(tiny.draft, kit.batch(tiny.config, samples), kit.context())
    tiny.model.zero_grad()
    torch.autograd.backward(out.loss_sum)
    grads = {n: p.grad for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(tiny.model.parameters()))
    return out, {n: g.clone() for n, g in grads.items()}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(head_chunk=7, **options)
    samples = kit.samples((9, 7))
    out, found = run(kit, tiny, samples)
    model = kit.model64(tiny)
    want = reference(kit, tiny, model, samples)
    torch.autograd.backward(want.loss)

    close(out.loss_sum, want.loss, terms=TERMS)
    close(float(out.weight), want.weight, terms=200, dtype=torch.float32)
    told = {name: (float(r.num), float(r.den)) for name, r in out.metrics.items()}
    assert told["trained"] == (want.trained, want.slots)
    assert want.trained > 2
    assert told["base_accuracy"] == (want.hits["base"], want.slots)
    assert told["accuracy"] == (want.hits["path"], want.slots)
    recall = f"recall_at_{tiny.config.candidate_top_k}"
    assert told[recall] == (want.hits["any"], want.slots)
    names = {"path": "", "base": "base_", "any": "oracle_"}
    for name, prefix in names.items():
        assert told[f"{prefix}acceptance_length"] == (want.lengths[name], want.blocks), name
    for name, exact in model.named_parameters():
        assert exact.grad is not None, name
        error = (found[name].double() - exact.grad).norm() / exact.grad.norm().clamp(min=1e-9)
        assert error < 2e-4, name


def test_the_cases_have_tokens_that_are_no_candidates(kit: Any) -> None:
    """Else the test above would not see what is left out, nor that a path picks another token."""
    out, _ = run(kit, kit.tiny(), kit.samples((9, 7)))
    recall, trained = (out.metrics[n] for n in ("recall_at_6", "trained"))
    assert 0.1 < float(recall.num / recall.den) < 0.9
    assert float(trained.num / trained.den) < float(recall.num / recall.den)
    lengths = [out.metrics[f"{n}acceptance_length"].num for n in ("", "base_", "oracle_")]
    assert len({float(x) for x in lengths}) == 3


@pytest.mark.parametrize("options", [CASES[0], CASES[2]], ids=str)
def test_packed_is_padded_is_the_sum_of_the_samples(kit: Any, options: dict[str, Any]) -> None:
    samples = kit.samples((12, 9, 7))
    both = [
        run(kit, kit.tiny(**options | {"batches": batches}), samples)
        for batches in ("packed", "padded")
    ]
    parts = [run(kit, kit.tiny(**options), [sample]) for sample in samples]
    for out, grads in both:
        close(out.loss_sum, torch.stack([p.loss_sum for p, _ in parts]).sum(), terms=TERMS)
        close(out.weight, torch.stack([p.weight for p, _ in parts]).sum(), terms=200)
        for name, ratio in out.metrics.items():
            close(ratio.den, torch.stack([p.metrics[name].den for p, _ in parts]).sum(), terms=1)
            num = torch.stack([p.metrics[name].num for p, _ in parts]).sum()
            close(ratio.num, num, terms=TERMS, name=name)
        for name, gradient in grads.items():
            close(gradient, torch.stack([g[name] for _, g in parts]).sum(0), terms=TERMS)


def test_a_new_drafts_head_is_that_of_a_dflash_draft_of_the_same_seed(kit: Any) -> None:
    options = {"conv_kernel_size": 2, "conv_group_size": 6}
    tiny, samples = kit.tiny(fresh=True, **options), kit.samples((12, 9, 7))
    plain = build_draft(
        tiny.config, tiny.target, tiny.frozen.embed_tokens, tiny.frozen.lm_head, mask_token_id=12
    )
    batch = kit.batch(tiny.config, samples)
    want = DFlashStep(tiny.config)(plain, batch, kit.context())
    found, _ = run(kit, tiny, samples)
    assert found.metrics["base_acceptance_length"] == want.metrics["acceptance_length"]
    close(found.metrics["cross_entropy"].num, want.metrics["cross_entropy"].num, terms=TERMS)
    close(found.weight, want.weight, terms=200)


def test_nothing_waits_for_the_device(kit: Any) -> None:
    """Sizes are those of the batch alone: the step runs where tensors have no values."""
    tiny = kit.tiny()
    batch = {k: v.to("meta") for k, v in kit.batch(tiny.config, kit.samples()).items()}
    tiny.model.to("meta")
    tiny.frozen.to("meta")
    out = LiLiCorrStep(tiny.config)(tiny.draft, batch, kit.context())
    torch.autograd.backward(out.loss_sum)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_group_size": 16, "conv_kernel_size": 2}, r"conv_group_size 16 .*size=8"),
        ({"candidate_top_k": 99}, "candidate_top_k=13"),
        ({"lattice_hidden_size": 0, "lattice_heads": 16}, "lattice_heads=8"),
        ({"lattice_heads": 3}, r"lattice_heads 3 does not divide the width 1024"),
    ],
)
def test_options_that_do_not_fit_the_target_are_refused_before_a_capture(
    kit: Any, options: dict[str, Any], message: str
) -> None:
    config = LiLiCorrConfig.model_validate({"name": "lilicorr", "mask_token_id": 1, **options})
    with pytest.raises(ConfigError, match=message):
        specforge_adapter(config=config, target=kit.tiny().target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_layout": "next_token"}, "same_position"),
        ({"conv_kernel_size": 2}, "both"),
        ({"conv_kernel_size": 17, "conv_group_size": 2}, "=16"),
        ({"ce_weight": 0, "penalty_weight": 0}, "ce_weight=0.25"),
    ],
)
def test_options_that_do_not_fit_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiLiCorrConfig.model_validate({"name": "lilicorr", **options})
