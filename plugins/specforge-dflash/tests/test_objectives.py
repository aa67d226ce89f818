"""What the target says as labels, and known tokens in a block, against the formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import specforge_dflash
import torch
from pydantic import ValidationError
from specforge_dflash import (
    DFlashConfig,
    DFlashStep,
    specforge_adapter,
    specforge_collate,
    specforge_verify_capture,
)
from specforge_dflash.proposer import DFlashProposer
from torch import Tensor

from specforge_core.target.measure import HeadScale
from specforge_core.testing.close import close
from specforge_core.types import StepOutput, TargetCapture

# what fc, two layers and the head sum over, and then the labels of a batch
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23) + 24 + 41 + 200
JETSPEC = {"causal": True, "loss": "kl", "weighting": "uniform"}
CASES: list[dict[str, Any]] = [
    {"labels": "target"},
    {**JETSPEC, "kl_temperature": 0.5, "softcap": 3.0, "beside": HeadScale(0.25, 2.0)},
    {**JETSPEC, "label_layout": "next_token", "labels": "target", "scale": 3.0},
    {"variable_prefix": 2},
]
MORE_CASES: list[dict[str, Any]] = [
    {"labels": "target", "label_layout": "next_token", "weighting": "dpace", "causal": True},
    {"labels": "target", "weighting": "uniform", "sliding_window": 5},
    {"loss": "kl", "kl_temperature": 2.0, "bias": True},
    {"variable_prefix": 1, "label_layout": "next_token", "weighting": "dpace", "block_size": 5},
    {"variable_prefix": 2, **JETSPEC, "weighting": "decay", "prefix_weight_base": 0.5},
]
ALL = [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)]
Samples = list[dict[str, Tensor]]


def teacher(tiny: Any, final: Tensor) -> Tensor:
    """The target's logits [V] behind its final state [H], before they are divided by T."""
    frozen = tiny.frozen
    out = frozen.states(final.double()) @ frozen.lm_head.double().t() * frozen.beside.scale
    cap = frozen.beside.softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def reference(kit: Any, tiny: Any, samples: Samples, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, weight and metrics, slot by slot; every possible anchor is taken.

    Where prefixes vary, blocks begin with as many known tokens as were drawn.
    """
    config = tiny.config
    first = 1 if config.label_layout == "same_position" else 0
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    hits: list[bool] = []
    lengths: list[float] = []
    overlaps: list[float] = []
    for sample, drawn in zip(samples, kit.draw(config, samples), strict=True):
        ids, mask, features = (sample[n] for n in ("input_ids", "loss_mask", "hidden_states"))
        places = drawn["anchors"].tolist()
        prefixes = dict(zip(places, drawn.get("prefixes", [1] * len(places)), strict=True))
        for a in range(len(ids) - 1):
            if not (mask[a] and mask[a + 1]):
                continue
            known = int(prefixes[a])
            logits = kit.logits64(weights, tiny, features, ids[a : a + known].tolist(), a)
            row: list[tuple[int, Tensor, float]] = []  # of a trained slot: number, loss, q
            right: list[bool] = []
            for k in range(config.num_draft_tokens - known + 1):
                place, q = a + known + k, logits[first + known - 1 + k]
                if place >= len(ids) or not mask[place]:
                    right.append(False)
                    continue
                own = config.labels == "target"
                label = int(sample["target_argmax"][place - 1] if own else ids[place])
                right.append(int(q.argmax()) == label)
                hits.append(right[-1])
                cost = q.logsumexp(0) - q[label]
                if config.loss == "kl":
                    t = config.kl_temperature
                    p = (teacher(tiny, sample["final"][place - 1]) / t).softmax(0)
                    log_q = (q / t).log_softmax(0)
                    cost = t**2 * (p * (p.log() - log_q)).sum()
                    overlaps.append(float(torch.minimum(p, log_q.detach().exp()).sum()))
                row.append((k, cost, math.exp(-float(cost.detach()))))
            for k, cost, _ in row:
                w = {"decay": math.exp(-k / config.gamma), "uniform": 1.0}.get(config.weighting)
                total += 1.0 if w is None else w
                if w is None:  # D-PACE: all prefixes that hold this slot
                    smooth = [(j, 0.5 * q + 0.5) for j, _, q in row]
                    w = sum(math.prod(s for j, s in smooth if j <= m) for m, _ in smooth if m >= k)
                loss = loss + w * cost
            if row:
                lengths.append(1 + [*right, False].index(False))
    found = {"accuracy": hits, "acceptance_length": lengths}
    if config.loss == "kl" and config.kl_temperature == 1:
        found["acceptance_rate"] = overlaps
    metrics = {name: sum(values) / len(values) for name, values in found.items()}
    return {"loss": loss, "weight": total, "metrics": metrics}


def run(kit: Any, tiny: Any, samples: Samples) -> StepOutput:
    return DFlashStep(tiny.config)(tiny.draft, kit.batch(tiny.config, samples), kit.context())


def gradients(tiny: Any, out: StepOutput) -> dict[str, Tensor]:
    tiny.model.zero_grad()
    torch.autograd.backward(out.loss_sum)
    found = {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(tiny.model.parameters()))
    return found


@pytest.mark.parametrize("options", ALL, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any]) -> None:
    """Packed and padded: the formula, and what autograd makes of it."""
    samples, exact = kit.taught((9, 6)), None
    for batches in ("packed", "padded"):
        tiny = kit.tiny(batches=batches, head_chunk=7, **options)
        out = run(kit, tiny, samples)
        if exact is None:
            exact = kit.weights64(tiny)
            want = reference(kit, tiny, samples, exact)
            want["loss"].backward()
        close(out.loss_sum, want["loss"], terms=TERMS)
        close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
        assert ("acceptance_rate" in out.metrics) == ("acceptance_rate" in want["metrics"])
        for name, value in want["metrics"].items():
            ratio = out.metrics[name]
            close(float(ratio.num / ratio.den), value, terms=TERMS, dtype=torch.float32, name=name)
        for name, gradient in gradients(tiny, out).items():
            given = exact[name].grad
            assert given is not None
            assert (gradient.double() - given).norm() / given.norm() < 1e-4, name


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_batch_is_the_sum_of_its_samples(kit: Any, options: dict[str, Any]) -> None:
    """So two ranks give what one gives."""
    tiny, samples = kit.tiny(**options), kit.taught((12, 9, 7))
    drawn, step = kit.draw(tiny.config, samples), DFlashStep(tiny.config)
    collate = specforge_collate(tiny.config, kit.spec(tiny.config), tiny.draft)
    whole = step(tiny.draft, collate(drawn), kit.context())
    parts = [step(tiny.draft, collate([sample]), kit.context()) for sample in drawn]
    pairs = [
        (whole.loss_sum, [p.loss_sum for p in parts]),
        (whole.weight, [p.weight for p in parts]),
    ]
    for name, ratio in whole.metrics.items():
        pairs.append((ratio.num, [p.metrics[name].num for p in parts]))
        pairs.append((ratio.den, [p.metrics[name].den for p in parts]))
    for value, each in pairs:
        close(
            float(value.detach()),
            sum(float(x.detach()) for x in each),
            terms=TERMS,
            dtype=torch.float32,
        )


@pytest.mark.parametrize("options", [{"labels": "target"}, JETSPEC], ids=str)
def test_what_is_asked_of_the_target_besides(kit: Any, options: dict[str, Any]) -> None:
    adapter = specforge_adapter(kit.config(layers=(1, 5), **options), kit.target())
    kl = options.get("loss") == "kl"
    assert (adapter.spec.next_tokens, adapter.spec.final) == (not kl, "post_norm" if kl else "none")
    states = {i: torch.full((3, 24), float(i)) for i in (1, 5)}
    capture = TargetCapture(
        index=0,
        input_ids=torch.arange(3),
        loss_mask=torch.ones(3, dtype=torch.int64),
        hidden_states=states,
        final=torch.full((3, 24), 7.0),
        next_tokens=torch.tensor([4, 5, 6]),
    )
    sample = adapter(capture)
    assert sample is not None
    assert sample.keys() == adapter.spec.fields.keys()
    assert ("target_argmax" in sample, "final" in sample) == (not kl, kl)


def test_choices_that_are_no_tokens_are_a_problem(kit: Any) -> None:
    target = kit.target()
    for choice, problems in ((40, 0), (41, 1), (-1, 1)):
        sample = {"input_ids": torch.tensor([1]), "target_argmax": torch.tensor([choice])}
        assert len(specforge_verify_capture(kit.config(), target, sample)) == problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kl", "weighting": "dpace"}, "weighting=uniform or decay"),
        ({"kl_temperature": 2.0}, "no effect with loss 'ce'"),
        ({"variable_prefix": 4}, "leaves no slot of a block of 4 to draft: set at most 3"),
        ({"prefix_weight_base": 0.5}, "no effect with variable_prefix 0"),
    ],
)
def test_objectives_that_disagree_are_refused(
    kit: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kit.config(**options)


@pytest.mark.parametrize("options", [{"labels": "target"}, JETSPEC], ids=str)
def test_a_batch_without_anchors_has_zero_loss_and_gradients(
    kit: Any, options: dict[str, Any]
) -> None:
    """A rank whose samples have none must still take part in every collective."""
    tiny, spec = kit.tiny(**options), kit.spec(kit.config(**options))
    none = torch.empty(0, dtype=torch.int64)
    stored = [{name: sample[name] for name in spec.fields} for sample in kit.taught()]
    samples = [{**sample, "anchors": none} for sample in stored]
    batch = specforge_collate(tiny.config, spec, tiny.draft)(samples)
    out = DFlashStep(tiny.config)(tiny.draft, batch, kit.context())
    assert not any(gradient.any() for gradient in gradients(tiny, out).values())
    assert float(out.loss_sum.detach()) == float(out.weight) == 0.0
    assert out.metrics.keys() == run(kit, tiny, kit.taught()).metrics.keys()


def test_a_variant_that_extends_the_shared_options_trains_as_dflash(kit: Any) -> None:
    """It has none of the options of DFlash alone."""
    tiny, samples = kit.tiny(), kit.taught()
    shared = tiny.config.model_dump(include=set(DFlashConfig.model_fields))
    variant = DFlashConfig.model_validate({**shared, "layers": (1, 5)})
    batch, draft = kit.batch(variant, samples), specforge_dflash.build_draft
    out = specforge_dflash.specforge_train_step(variant)(tiny.draft, batch, kit.context())
    assert torch.equal(out.loss_sum, run(kit, tiny, samples).loss_sum)
    embed, head = tiny.frozen.embed_tokens, tiny.frozen.lm_head
    made = draft(variant, kit.target(), embed, head, mask_token_id=40)
    assert isinstance(specforge_dflash.specforge_proposer(variant, made), DFlashProposer)


DEVICE_CASES: list[dict[str, Any]] = [
    {"weighting": "dpace", "sliding_window": 9},
    {**JETSPEC, "labels": "target"},
    {"variable_prefix": 2, "loss": "kl"},
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# what torch says when the debug mode is switched on
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("attention", ["auto", "flex", "eager"])
@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize("options", DEVICE_CASES, ids=str)
def test_a_step_never_waits_for_the_device(
    kit: Any, attention: str, batches: str, options: dict[str, Any]
) -> None:
    tiny = kit.tiny(head_dim=16, attention=attention, batches=batches, **options)
    tiny.model.cuda()
    tiny.frozen.cuda()
    step = DFlashStep(tiny.config)

    def once(lengths: tuple[int, ...], mode: str) -> StepOutput:
        batch = kit.batch(tiny.config, kit.taught(lengths))
        moved = {name: tensor.cuda() for name, tensor in batch.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = step(tiny.draft, moved, kit.context())
            torch.autograd.backward(out.loss_sum)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return out

    for lengths in ((190, 110), (170, 150), (210, 130)):  # compiled, and tables moved
        once(lengths, "default")
    assert float(once((200, 140), "error").loss_sum.detach()) > 0
