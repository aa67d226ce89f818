"""The objective against the formulas written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash import build_draft
from specforge_dflash.step import DFlashStep, teachers
from specforge_dflash2.selector import candidates
from specforge_dflash2.step import DFlash2Step
from torch import Tensor

from specforge_core.testing.close import close
from specforge_core.types import StepOutput

from ...dflash_kit import slot_weights

# what fc, two layers with their convolutions, head and selector sum over, and a batch's labels
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23 + 4 * 26) + 24 + 41 + 24 + 5 + 200

Samples = list[dict[str, Tensor]]
CASES: list[dict[str, Any]] = [
    {},
    {"batches": "padded"},
    {"weighting": "dpace", "dpace_alpha": 0.3},
    {"weighting": "dpace_confidence"},
    {"weighting": "dpace_continuation"},
    {"weighting": "uniform"},
    {"decay_gamma": 1.5},
    {"conv_kernel_size": 3, "conv_group_size": 8},
    {"conv_kernel_size": 1, "conv_group_size": 24},
    {"selector_weight": 0.25, "selector_top_k": 2},
    {"selector_top_k": 41},
    {"detach_selector": True, "batches": "padded"},
    {"output_multiplier": 0.5, "softcap": 4.0},
    {"sliding_window": 5, "block_size": 5},
]


def reference(kit: Any, tiny: Any, samples: Samples, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, weight and metrics, slot by slot; every possible anchor is taken."""
    config, sums = tiny.config, dict.fromkeys(("slots", "right", "base", "recall", "blocks"), 0)
    lengths = {"right": 0, "base": 0, "recall": 0}
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for sample in samples:
        ids, mask, features = (sample[n] for n in ("input_ids", "loss_mask", "hidden_states"))
        for a in range(len(ids) - 1):
            if not (mask[a] and mask[a + 1]):
                continue
            states = kit.states64(weights, tiny, features, int(ids[a]), a)
            terms: list[tuple[Tensor, Tensor, dict[str, bool]] | None] = []
            for k in range(1, config.block_size):
                inside = a + k < len(ids) and bool(mask[a + k])
                pair = ids[a + k - 1 : a + k + 1].tolist()
                terms.append(slot(kit, tiny, weights, states[k], pair) if inside else None)
            for weight, found in zip(weights_of(config, terms), terms, strict=True):
                if found is not None:
                    head, selector, hits = found
                    loss = loss + weight * (head + config.selector_weight * selector)
                    total += weight if config.weighting == "decay" else 1
                    sums["slots"] += 1
                    for name, hit in hits.items():
                        sums[name] += hit
            sums["blocks"] += any(t is not None for t in terms)
            for name in lengths:
                lengths[name] += 1
                for found in terms:
                    if found is None or not found[2][name]:
                        break
                    lengths[name] += 1
    return {"loss": loss, "weight": total, **sums, **{f"{n}_length": x for n, x in lengths.items()}}


def slot(
    kit: Any, tiny: Any, weights: dict[str, Tensor], state: Tensor, pair: list[int]
) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """Both cross-entropies and the hits of one slot; `pair` is the token before and its own."""
    before, label = pair
    logits = kit.logits64(tiny, state)
    best = logits.argsort(descending=True)[: tiny.config.selector_top_k].tolist()
    trained = best if label in best else [*best[:-1], label]
    seen = (logits.detach(), state.detach()) if tiny.config.detach_selector else (logits, state)

    def score(tokens: list[int]) -> Tensor:
        total: Tensor = seen[0][tokens] + kit.edges64(weights, seen[1], before, tokens)
        return total

    scores = score(trained)
    chosen = best[int(score(best).argmax())]
    hits = {"right": chosen == label, "base": best[0] == label, "recall": label in best}
    head = logits.logsumexp(0) - logits[label]
    return head, scores.logsumexp(0) - scores[trained.index(label)], hits


def weights_of(config: Any, terms: list[Any]) -> list[float]:
    losses = [None if found is None else float(found[0].detach()) for found in terms]
    return slot_weights(config, config.gamma, losses)


def run(kit: Any, tiny: Any, samples: Samples) -> tuple[StepOutput, dict[str, Tensor]]:
    """The step's output, and the gradients under their published names."""
    out = DFlash2Step(tiny.config)(tiny.draft, kit.batch(tiny.config, samples), kit.context())
    tiny.model.zero_grad()
    torch.autograd.backward(out.loss_sum)
    grads = {n: p.grad for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(tiny.model.parameters()))
    return out, {n.removeprefix("backbone."): g.clone() for n, g in grads.items()}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(head_chunk=7, **options)
    samples = kit.samples((13, 9, 6))
    out, found = run(kit, tiny, samples)
    weights = kit.weights64(tiny)
    want = reference(kit, tiny, samples, weights)
    torch.autograd.backward(want["loss"])

    close(out.loss_sum, want["loss"], terms=TERMS)
    close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
    told = {name: (float(r.num), float(r.den)) for name, r in out.metrics.items()}
    slots, blocks = want["slots"], want["blocks"]
    assert told["accuracy"] == (want["right"], slots)
    assert told["base_accuracy"] == (want["base"], slots)
    assert told[f"recall_at_{tiny.config.selector_top_k}"] == (want["recall"], slots)
    assert told["acceptance_length"] == (want["right_length"], blocks)
    assert told["base_acceptance_length"] == (want["base_length"], blocks)
    assert told["oracle_acceptance_length"] == (want["recall_length"], blocks)
    for name, gradient in found.items():
        exact = weights[name].grad
        assert exact is not None
        error = (gradient.double() - exact).norm() / exact.norm()
        assert error < 1e-4, name


def test_the_cases_have_tokens_that_are_no_candidates(kit: Any) -> None:
    """Else the test above would not see where the true token is put."""
    out, _ = run(kit, kit.tiny(), kit.samples((13, 9, 6)))
    recall = out.metrics["recall_at_6"]
    assert 0.05 < float(recall.num / recall.den) < 0.95


@pytest.mark.parametrize("options", CASES[:4], ids=str)
def test_packed_is_padded_is_the_sum_of_the_samples(kit: Any, options: dict[str, Any]) -> None:
    samples = kit.samples((19, 11, 7))
    both = [
        run(kit, kit.tiny(**options | {"batches": batches}), samples)
        for batches in ("packed", "padded")
    ]
    parts = [run(kit, kit.tiny(**options), [sample]) for sample in samples]
    for out, grads in both:
        close(out.loss_sum, torch.stack([p.loss_sum for p, _ in parts]).sum(), terms=TERMS)
        close(out.weight, torch.stack([p.weight for p, _ in parts]).sum(), terms=200)
        for name, gradient in grads.items():
            close(gradient, torch.stack([g[name] for _, g in parts]).sum(0), terms=TERMS)


def test_a_new_draft_is_a_dflash_draft_of_the_same_seed(kit: Any) -> None:
    """Both additions change nothing at first."""
    tiny, samples = kit.tiny(fresh=True, selector_weight=0.0), kit.samples()
    plain = build_draft(
        tiny.config, tiny.target, tiny.frozen.embed_tokens, tiny.frozen.lm_head, mask_token_id=40
    )
    batch = kit.batch(tiny.config, samples)
    want = DFlashStep(tiny.config)(plain, batch, kit.context())
    found, _ = run(kit, tiny, samples)
    close(found.loss_sum, want.loss_sum, terms=TERMS)
    assert found.metrics["acceptance_length"] == found.metrics["base_acceptance_length"]
    assert found.metrics["acceptance_length"] == want.metrics["acceptance_length"]


def test_candidates_and_their_gradient_are_those_of_the_plain_form() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(9, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 6, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 13, (9,), generator=draw)
    slopes = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    ids, logits, found = candidates(states, head, labels, 4, softcap=2.0, chunk=2)
    whole = states @ head.t()
    best = whole.topk(4, dim=1).indices
    assert torch.equal(found, (best == labels[:, None]).any(1))
    assert 0 < int(found.sum()) < 9
    want = torch.where(found, best[:, -1], labels)
    assert torch.equal(ids, torch.cat([best[:, :-1], want[:, None]], dim=1))
    plain = 2 * torch.tanh(whole.gather(1, ids) / 2)
    close(logits, plain, terms=6)
    (grad,) = torch.autograd.grad((logits * slopes).sum(), states)
    (exact,) = torch.autograd.grad((plain * slopes).sum(), states)
    close(grad, exact, terms=10)


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_the_token_before_a_slot_is_the_true_one_where_it_is_not_supervised(
    kit: Any, batches: str
) -> None:
    tiny = kit.tiny(batches=batches)
    sample = kit.samples((9,))[0]
    sample["loss_mask"] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 0])
    batch = kit.batch(tiny.config, [kit.samples((12,), seed=5)[0], sample])
    where = (-1, -1) if batches == "packed" else (1, 0)
    valid, labels = (batch[name][where] for name in ("valid", "labels"))
    places = teachers(tiny.config, batch).view(*batch["anchors"].shape, -1)[where]
    previous = batch["input_ids"].flatten()[places]
    ids = sample["input_ids"]
    assert valid.tolist() == [False, True, False, True]
    assert previous.tolist() == ids[1:4].tolist()  # 3 is not supervised
    assert labels.tolist() == [0, ids[2], 0, ids[4]]
