"""The objective against its formulas in float64, for every option, gradients included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from specforge_eagle3 import specforge_collate
from specforge_eagle3.step import Eagle3Step
from torch import Tensor

from specforge_core.batches.collate import pack, pad
from specforge_core.batches.loader import to_device
from specforge_core.errors import CaptureError
from specforge_core.testing.close import close

TERMS = 3 * (3 * 24 + 5 * 96 + 60 + 29)  # three steps of a draft layer and its head
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask_on": "input"},
    {"mask_on": "feature"},
    {"mean_over": "supervised"},
    {"loss": "lk_alpha"},
    {"loss": "lk_lambda"},
    {"loss": "lk_lambda", "lk_scale": 0.6, "lk_decay": 1.3, "mean_over": "supervised"},
    {"norm_output": True},
    {"fc_norm": True},
    {"layer_type": "qwen3"},
    {"draft_vocab_size": "full"},
    {"steps": 1},
    {"draft_length": 1},
    {"steps": 5, "step_decay": 0.5, "norm_output": True, "fc_norm": True},
    {"head_chunk": 1},
    {"softcap": 3.0},
]


def names(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_loss_gradients_and_metrics_are_the_formulas(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(torch.float64, **options)
    samples = kit.samples(softcap=options.get("softcap"))
    out = Eagle3Step(tiny.config)(tiny.draft, kit.batch(tiny, samples), kit.context())
    loss = out.loss_sum / out.weight
    loss.backward()

    weights = kit.weights64(tiny)
    exact = kit.objective64(weights, tiny, samples)
    exact.loss.backward()
    close(loss, exact.loss, terms=1, dtype=torch.float32)
    for name, parameter in tiny.model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, weights[name].grad, terms=1, dtype=torch.float32, name=name)

    metrics = {name: float(r.num / r.den) for name, r in out.metrics.items()}
    # metrics are float32, and so are the tables of the rotary embedding
    means = {"acceptance_length": exact.lengths, "acceptance_rate": exact.overlaps}
    for name, values in means.items():
        want = sum(values) / len(values)
        close(metrics[name], want, terms=1, dtype=torch.float32, name=name)
    for k, right in enumerate(exact.hits):
        close(metrics[f"accuracy_{k + 1}"], sum(right) / len(right), terms=1, dtype=torch.float32)


@pytest.mark.slow
def test_some_rows_hit_and_some_tokens_cannot_be_drafted(kit: Any) -> None:
    """What the comparison above is over: hits, misses and labels outside of the vocabulary."""
    tiny = kit.tiny(torch.float64)
    samples = kit.samples((90, 60))
    exact = kit.objective64(kit.weights64(tiny), tiny, samples)
    assert any(itertools.chain(*exact.hits))
    assert len(set(exact.lengths)) > 1
    out = Eagle3Step(tiny.config)(tiny.draft, kit.batch(tiny, samples), kit.context())
    ratio = out.metrics["in_draft_vocab"]
    assert 0.3 < float(ratio.num / ratio.den) < 0.9


@pytest.mark.parametrize("mask_on", ["label", "input", "feature"])
@pytest.mark.parametrize("mean_over", ["positions", "supervised"])
def test_padded_and_packed_batches_give_the_same(kit: Any, mask_on: str, mean_over: str) -> None:
    tiny = kit.tiny(torch.float64, mask_on=mask_on, mean_over=mean_over)
    samples = kit.samples()
    step = Eagle3Step(tiny.config)
    results = []
    for arrange in (pack, pad):
        tiny.model.zero_grad()
        out = step(tiny.draft, kit.batch(tiny, samples, arrange), kit.context())
        out.loss_sum.backward()
        grads = [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
        ratios = [v for r in out.metrics.values() for v in (r.num, r.den)]
        results.append([out.loss_sum.detach(), out.weight, *ratios, *grads])
    for one, other in zip(*results, strict=True):
        close(one, other, terms=TERMS)


@pytest.mark.parametrize("mean_over", ["positions", "supervised"])
def test_any_split_of_a_batch_adds_up(kit: Any, mean_over: str) -> None:
    tiny = kit.tiny(torch.float64, mean_over=mean_over)
    samples = kit.samples()
    step = Eagle3Step(tiny.config)
    whole = step(tiny.draft, kit.batch(tiny, samples), kit.context())
    parts = [
        step(tiny.draft, kit.batch(tiny, p), kit.context()) for p in (samples[:1], samples[1:])
    ]
    loss = sum(p.loss_sum for p in parts) / sum(p.weight for p in parts)
    # weights are summed in float32
    close(loss, whole.loss_sum / whole.weight, terms=1, dtype=torch.float32)
    for name, ratio in whole.metrics.items():
        num = sum(p.metrics[name].num for p in parts)
        den = sum(p.metrics[name].den for p in parts)
        close(num / den, ratio.num / ratio.den, terms=1, dtype=torch.float32, name=name)


def test_a_documents_neighbours_do_not_matter(kit: Any) -> None:
    """Packed, padded, or one by one; whatever is in the others, values that drown all else too."""
    tiny = kit.tiny(torch.float64)
    samples = [*kit.samples(), *kit.samples(seed=9)]
    step = Eagle3Step(tiny.config)

    def loss(*chosen: dict[str, Tensor], arrange: Any = pack) -> Tensor:
        found: Tensor = step(tiny.draft, kit.batch(tiny, chosen, arrange), kit.context()).loss_sum
        return found.detach()

    alone = [loss(sample) for sample in samples]
    for arrange in (pack, pad):
        close(loss(*samples, arrange=arrange), sum(alone), terms=TERMS)
    for changed in range(len(samples)):
        huge = [dict(sample) for sample in samples]
        for name in ("hidden_states", "final"):
            huge[changed][name] = huge[changed][name] * 1e4
        want = sum(alone) - alone[changed] + loss(huge[changed])  # type: ignore[operator]
        if alone[changed]:  # the shortest may have no label
            assert abs(float(want - sum(alone))) > 1e-3
        for arrange in (pack, pad):
            close(loss(*huge, arrange=arrange), want, terms=TERMS)


def test_a_batch_without_a_label_has_no_loss_and_zero_gradients(kit: Any) -> None:
    tiny = kit.tiny()
    samples = kit.samples()
    for sample in samples:
        sample["loss_mask"].zero_()
    out = Eagle3Step(tiny.config)(tiny.draft, kit.batch(tiny, samples), kit.context())
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in tiny.model.parameters())


def test_a_frozen_head_gets_no_gradient(kit: Any) -> None:
    tiny = kit.tiny(train_head=False)
    out = Eagle3Step(tiny.config)(tiny.draft, kit.batch(tiny, kit.samples()), kit.context())
    out.loss_sum.backward()
    assert tiny.model.lm_head.weight.grad is None
    assert tiny.model.fc.weight.grad is not None
    assert tiny.model.fc.weight.grad.any()


def test_a_capture_of_another_strategy_is_named(kit: Any) -> None:
    tiny = kit.tiny()
    collate = specforge_collate(tiny.config, tiny.draft)
    samples = kit.samples()
    assert collate(samples)["present"].shape[1] == 3
    for name in ("final", "target_argmax"):
        del samples[1][name]
    with pytest.raises(CaptureError, match="samples have no final, target_argmax, which EAGLE-3"):
        collate(samples)


def test_what_the_target_gives_to_undraftable_tokens_is_accepted_nowhere(kit: Any) -> None:
    tiny = kit.tiny(torch.float64)
    samples = kit.samples((60, 40))
    step = Eagle3Step(tiny.config)
    out = step(tiny.draft, kit.batch(tiny, samples), kit.context())
    tokens = tiny.model.t2d.nonzero().squeeze(1)
    for sample in samples:  # as if the target knew no other tokens
        scores = sample["final"].double() @ tiny.head.double()[tokens].t()
        sample["target_logsumexp"] = scores.logsumexp(-1)
    alone = step(tiny.draft, kit.batch(tiny, samples), kit.context())
    told, lost = (float(o.metrics["acceptance_rate"].num) for o in (out, alone))
    assert told < 0.9 * lost
    assert torch.equal(out.loss_sum, alone.loss_sum)  # KL is among the draft's tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# what torch says when the debug mode is switched on
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("options", [{}, {"loss": "lk_lambda", "mean_over": "supervised"}])
def test_no_step_waits_for_the_device(kit: Any, options: dict[str, Any]) -> None:
    """Beyond the first, which compiles kernels and moves tables."""
    tiny = kit.tiny(torch.bfloat16, **options)
    draft, step = tiny.draft, Eagle3Step(tiny.config)
    draft.model.cuda()
    draft.frozen.cuda()
    batches = [
        to_device(kit.batch(tiny, kit.samples(n)), torch.device("cuda")) for n in ((40, 7), (23,))
    ]
    for batch in batches:
        torch.autograd.backward(step(draft, batch, kit.context()).loss_sum)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            out = step(draft, batch, kit.context())
            torch.autograd.backward(out.loss_sum)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(out.loss_sum))


def test_nothing_of_length_by_draft_vocabulary_is_kept(kit: Any) -> None:
    """Between forward and backward: the head's states and gradients, but no logits."""
    tiny = kit.tiny(steps=4, head_chunk=8)
    sizes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        Eagle3Step(tiny.config)(tiny.draft, kit.batch(tiny, kit.samples((50, 30))), kit.context())
    head = tiny.model.lm_head.weight.shape
    assert tuple(head) in sizes  # its gradient, made in the forward pass
    large = [s for s in sizes if s[-1] == head[0] and s != tuple(head.__reversed__())]
    assert not large
