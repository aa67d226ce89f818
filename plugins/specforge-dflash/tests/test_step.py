"""The objective against the formulas written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from specforge_dflash import DFlashStep, train_slots
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from specforge_dflash.step import mean_divisor, slot_weights
from torch import Tensor

from specforge_core.draws import draws_of
from specforge_core.testing.close import close
from specforge_core.types import StepOutput

LAYOUTS = ["same_position", "next_token"]
# what fc, two layers and the head sum over, and then the labels of a batch
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23) + 24 + 41 + 200
WEIGHTINGS = ["decay", "dpace", "dpace_confidence", "dpace_continuation"]
SLIDING, CAUSAL = {"sliding_window": 6}, {"causal": True}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

Samples = list[dict[str, Tensor]]


def reference(kit: Any, tiny: Any, samples: Samples, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, weight and metrics, slot by slot; every possible anchor is taken."""
    config, first = tiny.config, 1 if tiny.config.label_layout == "same_position" else 0
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    right, slots, accepted, blocks = 0, 0, 0.0, 0
    for sample in samples:
        ids, mask, features = (sample[n] for n in ("input_ids", "loss_mask", "hidden_states"))
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


def run(kit: Any, tiny: Any, samples: Samples, epoch: int = 0) -> StepOutput:
    batch = kit.batch(tiny.config, samples, epoch)
    return DFlashStep(tiny.config)(tiny.draft, batch, kit.context())


def gradients(tiny: Any, out: StepOutput) -> dict[str, Tensor]:
    tiny.model.zero_grad()
    torch.autograd.backward(out.loss_sum)
    found = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(tiny.model.parameters()))
    return found


@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_weight_metrics_and_gradients(
    kit: Any, layout: str, weighting: str, batches: str
) -> None:
    tiny = kit.tiny(
        label_layout=layout, weighting=weighting, head_chunk=7, dpace_alpha=0.3, batches=batches
    )
    samples = kit.samples((19, 11, 6))
    out = run(kit, tiny, samples)
    found = gradients(tiny, out)
    weights = kit.weights64(tiny)
    want = reference(kit, tiny, samples, weights)
    want["loss"].backward()

    close(out.loss_sum, want["loss"], terms=TERMS)
    close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
    ratios = {name: float(r.num / r.den) for name, r in out.metrics.items()}
    close(ratios["accuracy"], want["accuracy"], terms=1, dtype=torch.float32)
    close(ratios["acceptance_length"], want["length"], terms=1, dtype=torch.float32)
    for name, gradient in found.items():
        exact = weights[name].grad
        assert exact is not None
        error = (gradient.double() - exact).norm() / exact.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize("options", [SLIDING, SLIDING | MIXED, CAUSAL, SLIDING | MIXED | CAUSAL])
def test_sliding_and_causal_layers_softcap_and_scaled_embeddings(
    kit: Any, batches: str, options: dict[str, Any]
) -> None:
    tiny = kit.tiny(softcap=4.0, scale=5.0, block_size=5, batches=batches, **options)
    samples = kit.samples((19, 11, 6))
    out = run(kit, tiny, samples)
    want = reference(kit, tiny, samples, kit.weights64(tiny))
    close(out.loss_sum, want["loss"], terms=TERMS)


OPTIONS: list[dict[str, Any]] = [
    *({"weighting": w, "label_layout": x} for w in WEIGHTINGS for x in LAYOUTS),
    {"sliding_window": 5},
    {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    {"num_anchors": 3},
    CAUSAL,
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_is_padded_is_the_sum_of_the_samples(kit: Any, options: dict[str, Any]) -> None:
    """Losses, weights, metrics and gradients; the same blocks of a sample in any batch."""
    samples = kit.samples((19, 11, 7))
    found = {}
    for batches in ("packed", "padded"):
        tiny = kit.tiny(batches=batches, **options)
        out = run(kit, tiny, samples)
        found[batches] = out, gradients(tiny, out)
    batch = kit.batch(tiny.config, samples)
    parts = [alone(kit, tiny, samples, number) for number in range(len(samples))]
    assert batch["valid"].sum() == sum(int(b["valid"].sum()) for b, _, _ in parts)
    for out, grads in found.values():
        total = sum(float(p.loss_sum.detach()) for _, p, _ in parts)
        close(float(out.loss_sum.detach()), total, terms=TERMS, dtype=torch.float32)
        weight = sum(float(p.weight) for _, p, _ in parts)
        close(float(out.weight), weight, terms=200, dtype=torch.float32)
        for metric, ratio in out.metrics.items():
            for side in ("num", "den"):
                summed = sum(float(getattr(p.metrics[metric], side)) for _, p, _ in parts)
                close(float(getattr(ratio, side)), summed, terms=TERMS, dtype=torch.float32)
        for parameter, gradient in grads.items():
            summed_grad = torch.stack([g[parameter] for _, _, g in parts]).sum(0)
            close(gradient, summed_grad, terms=TERMS)


def alone(
    kit: Any, tiny: Any, samples: Samples, number: int
) -> tuple[dict[str, Tensor], StepOutput, dict[str, Tensor]]:
    """One sample by itself, drawn as the `number`th."""
    spec = capture_spec((1, 5), 24)
    drawn = DFlashTransform(spec, 1000, tiny.config.num_anchors)(
        samples[number], draws_of(0, 0, number)
    )
    assert drawn is not None
    batch = DFlashCollate(tiny.config, spec, 40)([drawn])
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    return batch, out, gradients(tiny, out)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("huge", [0, 1])
def test_documents_of_a_row_never_see_each_other(
    kit: Any, options: dict[str, Any], huge: int
) -> None:
    """One document's states and tokens change; losses and gradients of the other do not."""
    samples = kit.samples((19, 11))
    kept = 1 - huge
    results = []
    for size in (1.0, 1e6):
        tiny = kit.tiny(**options)
        changed = [dict(sample) for sample in samples]
        changed[huge]["hidden_states"] = changed[huge]["hidden_states"] * size
        if size > 1:
            changed[huge]["input_ids"] = changed[huge]["input_ids"] % 7 + 1
        batch = kit.batch(tiny.config, changed)
        begin = 19 * kept
        own = (batch["starts"] == begin)[..., None] & batch["valid"]
        batch = train_slots(batch, own)  # only the kept document is trained
        batch["hidden_states"].requires_grad_()
        out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
        grads = gradients(tiny, out)
        assert float(out.weight) > 0
        states = batch["hidden_states"].grad
        assert states is not None
        mine = batch["document_ids"][0] == kept + 1
        assert states[0, mine].any()
        assert not states[0, ~mine].any()
        results.append((out.loss_sum.detach(), grads, states[0, mine]))
    (loss, grads, states), (loss_then, grads_then, states_then) = results
    assert torch.equal(loss, loss_then)
    assert torch.equal(states, states_then)
    for name, gradient in grads.items():
        close(gradient, grads_then[name], terms=TERMS)


def test_gradient_matches_finite_differences(kit: Any) -> None:
    tiny, samples = kit.tiny(), kit.samples()
    slope_of = gradients(tiny, run(kit, tiny, samples))["fc.weight"]
    weight = tiny.model.fc.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    slope = float((slope_of * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 2e-3 * direction
            values.append(float(run(kit, tiny, samples).loss_sum))
            weight -= sign * 2e-3 * direction
    # the slope is a difference of float32 sums; the rest is curvature
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(slope, rel=0.02)


def test_fewer_anchors_are_a_sample_of_all(kit: Any) -> None:
    tiny, samples = kit.tiny(num_anchors=3), kit.samples()
    out = run(kit, tiny, samples)
    assert out.metrics["acceptance_length"].den == 6
    assert float(out.loss_sum.detach()) == float(run(kit, tiny, samples).loss_sum.detach())
    assert float(out.loss_sum.detach()) != float(run(kit, tiny, samples, 5).loss_sum.detach())


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_a_batch_without_anchors_has_zero_loss_and_gradients(kit: Any, batches: str) -> None:
    """A rank whose samples have none must still take part in every collective."""
    tiny = kit.tiny(batches=batches)
    none = torch.empty(0, dtype=torch.int64)
    samples = [{**sample, "anchors": none} for sample in kit.samples()]
    batch = DFlashCollate(tiny.config, capture_spec((1, 5), 24), 40)(samples)
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    assert not any(gradient.any() for gradient in gradients(tiny, out).values())
    assert float(out.loss_sum.detach()) == float(out.weight) == 0.0
    assert out.metrics.keys() == run(kit, tiny, kit.samples()).metrics.keys()


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "uniform"])
def test_what_a_slot_of_a_whole_block_adds_to_the_divisor(kit: Any, weighting: str) -> None:
    config = kit.tiny(weighting=weighting).config
    losses = torch.arange(1.0, 13).view(3, 4)
    total = slot_weights(config, losses, losses > 0)[1]
    close(torch.tensor(12 * mean_divisor(config, 4)), total, terms=12)


def test_a_draft_learns_one_batch_by_heart(kit: Any) -> None:
    tiny, samples = kit.tiny(), kit.samples()
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    for _ in range(40):
        out = run(kit, tiny, samples)
        optimizer.zero_grad()
        torch.autograd.backward(out.loss_sum / out.weight)
        optimizer.step()
    accuracy = out.metrics["accuracy"]
    assert float(accuracy.num / accuracy.den) > 0.95
