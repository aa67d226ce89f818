"""The objective against the formulas written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from specforge_dflash import DFlashStep
from torch import Tensor

from specforge_core.testing.close import close, rounding

LAYOUTS = ["same_position", "next_token"]
# what fc, two layers and the head sum over, and then the labels of a batch
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23) + 24 + 41 + 200
WEIGHTINGS = ["decay", "dpace", "dpace_confidence", "dpace_continuation"]


def reference(kit: Any, tiny: Any, batch: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, weight and metrics, slot by slot; every possible anchor is taken."""
    config, first = tiny.config, 1 if tiny.config.label_layout == "same_position" else 0
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    right, slots, accepted, blocks = 0, 0, 0.0, 0
    for ids, mask, features in zip(*batch.values(), strict=True):
        for a in range(len(ids) - 1):
            if not (mask[a] and mask[a + 1]):
                continue
            logits = kit.logits64(weights, tiny, features, int(ids[a]), a)
            terms: list[tuple[Tensor, bool]] = []  # (cross-entropy, hit) or masked: (0, False)
            for k in range(first, config.block_size):
                place = a + k + (0 if first else 1)
                if place < len(ids) and mask[place]:
                    row, label = logits[k], int(ids[place])
                    terms.append((row.logsumexp(0) - row[label], int(row.argmax()) == label))
                else:
                    terms.append((torch.tensor(float("nan")), False))
            valid = [not math.isnan(float(c.detach())) for c, _ in terms]
            for k, (c, hit) in enumerate(terms):
                if not valid[k]:
                    continue
                slots, right = slots + 1, right + hit
                if config.weighting == "decay":
                    w = math.exp(-k / config.gamma)
                    total += w
                else:
                    w = dpace(config, terms, valid, k)
                    total += 1
                loss = loss + w * c
            prefix = 0
            while prefix < len(terms) and terms[prefix][1]:
                prefix += 1
            accepted, blocks = accepted + 1 + prefix, blocks + any(valid)
    return {
        "loss": loss, "weight": total, "accuracy": right / slots, "length": accepted / blocks
    }  # fmt: skip


def dpace(config: Any, terms: list[tuple[Tensor, bool]], valid: list[bool], k: int) -> float:
    smooth = [
        (1 - config.dpace_alpha) * math.exp(-float(c.detach())) + config.dpace_alpha if ok else 1.0
        for (c, _), ok in zip(terms, valid, strict=True)
    ]
    prefix = [math.prod(smooth[: j + 1]) for j in range(len(smooth))]
    suffix = sum(p for p, ok in list(zip(prefix, valid, strict=True))[k:] if ok)
    return {
        "dpace": suffix,
        "dpace_confidence": prefix[k],
        "dpace_continuation": suffix / prefix[k],
    }[str(config.weighting)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_weight_metrics_and_gradients(kit: Any, layout: str, weighting: str) -> None:
    tiny = kit.tiny(label_layout=layout, weighting=weighting, head_chunk=7, dpace_alpha=0.3)
    batch = kit.batch()
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    out.loss_sum.backward()
    weights = kit.weights64(tiny)
    want = reference(kit, tiny, batch, weights)
    want["loss"].backward()

    close(out.loss_sum, want["loss"], terms=TERMS)
    close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
    ratios = {name: float(r.num / r.den) for name, r in out.metrics.items()}
    close(ratios["accuracy"], want["accuracy"], terms=1, dtype=torch.float32)
    close(ratios["acceptance_length"], want["length"], terms=1, dtype=torch.float32)
    for name, parameter in tiny.model.named_parameters():
        exact = weights[name].grad
        assert parameter.grad is not None
        assert exact is not None
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        assert error < rounding(torch.float32, TERMS), name


def test_sliding_layers_softcap_and_scaled_embeddings(kit: Any) -> None:
    tiny = kit.tiny(softcap=4.0, scale=5.0, sliding_window=6, block_size=5)
    batch = kit.batch()
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    want = reference(kit, tiny, batch, kit.weights64(tiny))
    close(out.loss_sum, want["loss"], terms=TERMS)


def test_gradient_matches_finite_differences(kit: Any) -> None:
    tiny, batch = kit.tiny(), kit.batch()
    step = DFlashStep(tiny.config)
    step(tiny.draft, batch, kit.context()).loss_sum.backward()
    weight = tiny.model.fc.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    assert weight.grad is not None
    slope = float((weight.grad * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 2e-3 * direction
            values.append(float(step(tiny.draft, batch, kit.context()).loss_sum))
            weight -= sign * 2e-3 * direction
    # the slope is a difference of float32 sums; the rest is curvature
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(slope, rel=0.02)


def test_the_result_does_not_depend_on_the_batch_split(kit: Any) -> None:
    """Losses and weights of the samples alone sum to those of the padded batch."""
    tiny, batch = kit.tiny(), kit.batch((19, 11, 7))
    step = DFlashStep(tiny.config)
    whole = step(tiny.draft, batch, kit.context())
    parts = [
        step(tiny.draft, {k: v[i : i + 1, :n] for k, v in batch.items()}, kit.context())
        for i, n in enumerate((19, 11, 7))
    ]
    loss = sum(float(p.loss_sum.detach()) for p in parts)
    close(float(whole.loss_sum.detach()), loss, terms=TERMS, dtype=torch.float32)
    weight = sum(float(p.weight) for p in parts)
    close(float(whole.weight), weight, terms=200, dtype=torch.float32)


def test_fewer_anchors_are_a_sample_of_all(kit: Any) -> None:
    tiny, batch = kit.tiny(num_anchors=3), kit.batch()
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    assert out.metrics["acceptance_length"].den == 6
    other = DFlashStep(tiny.config)(tiny.draft, batch, kit.context(seed=5))
    assert float(out.loss_sum.detach()) != float(other.loss_sum.detach())


def test_a_batch_without_anchors_has_zero_loss_and_gradients(kit: Any) -> None:
    """A rank whose samples have none must still take part in every collective."""
    tiny, batch = kit.tiny(), kit.batch()
    batch["loss_mask"].zero_()
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == float(out.weight) == 0.0
    for parameter in tiny.model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_draft_learns_one_batch_by_heart(kit: Any) -> None:
    tiny, batch = kit.tiny(), kit.batch()
    step = DFlashStep(tiny.config)
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    for _ in range(40):
        out = step(tiny.draft, batch, kit.context())
        optimizer.zero_grad()
        (out.loss_sum / out.weight).backward()
        optimizer.step()
    accuracy = out.metrics["accuracy"]
    assert float(accuracy.num / accuracy.den) > 0.95
