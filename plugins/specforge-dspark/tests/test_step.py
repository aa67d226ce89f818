"""The objective against its formula, block by block and slot by slot in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from specforge_dflash.step import drafting_rows, teachers
from specforge_dspark.step import DSparkStep
from torch import Tensor

from specforge_core.testing.close import close
from specforge_core.types import StepOutput

from ...dflash_kit import slot_weights

# what fc, two layers, the recurrent head and the target's head sum over, then a batch's labels
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 20) + 4 * 36 + 6 + 24 + 41 + 200

CASES: list[dict[str, Any]] = [
    {},
    {"markov_head": "gated", "batches": "padded"},
    {"markov_head": "rnn", "label_layout": "same_position"},
    {"markov_head": "rnn", "weighting": "dpace", "batches": "padded"},
    {"confidence_with_markov": False, "label_layout": "same_position"},
    {"confidence_head": False, "ce_weight": 1.0, "tv_weight": 0.25, "weighting": "uniform"},
    {"weighting": "dpace_confidence", "dpace_alpha": 0.3},
    {"weighting": "dpace_continuation", "ce_weight": 0.0},
    {"confidence_weight": 0.5, "decay_gamma": 2.0, "softcap": 3.0, "head_scale": 0.5},
    {"bias": True, "scale": 3.0, "sliding_window": 5},
]


def reference(kit: Any, tiny: Any, model: Any, samples: Any) -> dict[str, Any]:
    """Loss, weight and metrics; every possible anchor is taken."""
    config = tiny.config
    first = 1 if config.label_layout == "same_position" else 0
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    hits: list[bool] = []
    rates: list[float] = []
    errors: list[float] = []
    lengths: list[float] = []
    expected: list[float] = []
    for sample in samples:
        names = ("input_ids", "loss_mask", "hidden_states", "final")
        ids, mask, features, final = (sample[n] for n in names)
        for a in range(len(ids) - 1):
            if not (mask[a] and mask[a + 1]):
                continue
            count = 0  # tokens up to the first that is not supervised
            while count < config.block_size - first and a + count + 1 < len(ids):
                if not mask[a + count + 1]:
                    break
                count += 1
            states = kit.block_states(model, tiny, features, int(ids[a]), a)
            before = ids[a : a + count].tolist()
            logits, confidences = kit.chain(model, tiny, states[first : first + count], before)
            slots: list[tuple[Tensor, float]] = []
            right: list[bool] = []
            kept: list[float] = []
            for k, row in enumerate(logits):
                label = int(ids[a + k + 1])
                q, p = row.softmax(0), kit.target_probs(tiny, final[a + k])
                accepted = float(torch.minimum(p, q).sum().detach())
                ce = row.logsumexp(0) - row[label]
                total = config.ce_weight * ce + config.tv_weight * (p - q).abs().sum()
                if config.confidence_head:
                    c = torch.sigmoid(confidences[k])
                    bce = -(accepted * c.log() + (1 - accepted) * (1 - c).log())
                    total = total + config.confidence_weight * bce
                    errors.append(abs(float(c.detach()) - accepted))
                slots.append((total, float(ce.detach())))
                right.append(int(row.argmax()) == label)
                kept.append(accepted)
            # 4 as published; slots behind the first gap are not there
            gamma = 4.0 if config.decay_gamma is None else config.decay_gamma
            weights = slot_weights(config, gamma, [x for _, x in slots])
            for w, (total, _) in zip(weights, slots, strict=True):
                loss = loss + w * total
                weight += w if config.weighting == "decay" else 1
            hits += right
            rates += kept
            lengths.append(1 + [*right, False].index(False))
            expected.append(1 + sum(math.prod(kept[: k + 1]) for k in range(len(kept))))
    found = {"accuracy": hits, "acceptance_rate": rates, "acceptance_length": lengths}
    found |= {"expected_acceptance_length": expected}
    if errors:
        found["confidence_error"] = errors
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {"loss": loss, "weight": weight, "metrics": means}


def run(kit: Any, tiny: Any, samples: Any) -> StepOutput:
    return DSparkStep(tiny.config)(tiny.draft, kit.batch(tiny.config, samples), kit.context())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any]) -> None:
    tiny, samples = kit.tiny(head_chunk=7, **options), kit.samples((13, 9, 6))
    out, model = run(kit, tiny, samples), kit.model64(tiny)
    want = reference(kit, tiny, model, samples)
    close(out.loss_sum, want["loss"], terms=TERMS)
    close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
    for name, value in want["metrics"].items():
        ratio = out.metrics[name]
        close(float(ratio.num / ratio.den), value, terms=TERMS, dtype=torch.float32, name=name)
    assert ("confidence_error" in out.metrics) == tiny.config.confidence_head
    exact = gradients(model, want["loss"])
    for name, gradient in gradients(tiny.model, out.loss_sum).items():
        error = (gradient.double() - exact[name]).norm() / exact[name].norm()
        assert error < 1e-4, name


def test_a_batch_is_the_sum_of_its_samples_padded_or_packed(kit: Any) -> None:
    samples, options = kit.samples((19, 11, 7)), {"markov_head": "rnn"}
    alone = [run(kit, kit.tiny(**options), [sample]) for sample in samples]
    for batches in ("packed", "padded"):
        out = run(kit, kit.tiny(batches=batches, **options), samples)
        for name, ratio in out.metrics.items():
            total = sum(float(p.metrics[name].num) for p in alone)
            close(float(ratio.num), total, terms=TERMS, dtype=torch.float32)
        total = sum(float(p.loss_sum.detach()) for p in alone)
        close(float(out.loss_sum.detach()), total, terms=TERMS, dtype=torch.float32)


def test_nothing_behind_a_gap_is_trained(kit: Any) -> None:
    """Only what a draft that is right so far can reach."""
    tiny, sample = kit.tiny(), kit.samples((9,))[0]
    sample["loss_mask"] = torch.tensor([0, 1, 1, 1, 0, 1, 0, 0, 0])
    valid = kit.batch(tiny.config, [sample])["valid"][0]
    assert valid.tolist() == [[True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize(("layout", "shift"), [("next_token", 0), ("same_position", -1)])
def test_the_teacher_of_a_slot_is_the_token_before_its_label(
    kit: Any, layout: str, shift: int
) -> None:
    tiny, sample = kit.tiny(label_layout=layout), kit.samples((9,))[0]
    sample["loss_mask"] = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0])
    batch = kit.batch(tiny.config, [sample])
    labels = batch["labels"].flatten()[batch["rows"]]
    assert labels.tolist() == sample["input_ids"][[4, 5, 5]].tolist()
    rows = drafting_rows(tiny.config, batch)
    assert teachers(tiny.config, batch).flatten()[rows].tolist() == [3, 4, 4]
    assert (batch["rows"] % 4).tolist() == [0 - shift, 1 - shift, 0 - shift]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce_weight": 0, "tv_weight": 0}, "no token would be learned"),
        ({"confidence_head": False, "confidence_threshold": 0.5}, "needs confidence_head"),
    ],
)
def test_options_that_do_not_agree(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kit.config(**options)
