"""The objective against its formula, element by element in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_peagle.step import PeagleStep
from torch import Tensor

from specforge_core.batches.collate import pack, pad
from specforge_core.testing.close import close
from specforge_core.types import StepOutput

# what fc, two layers, the head and the labels of a batch sum over
TERMS = 72 + 2 * (48 + 32 + 24 + 40 + 20) + 24 + 29 + 200
CASES: list[dict[str, Any]] = [
    {},
    {"loss": "lk_alpha", "mask_on": "input"},
    {"loss": "lk_lambda", "lk_decay": 1.0, "lk_scale": 0.7, "draft_length": 2},
    {"layer_type": "qwen3", "draft_vocab_size": "full", "train_embedding": False},
    {"mask_on": "feature", "keep_ratio": 1, "softcap": 4.0},
    {"depths": 1, "num_layers": 1, "train_head": False},
]


def run(kit: Any, tiny: Any, samples: Any, arrange: Any = pack) -> StepOutput:
    batch = kit.batch(tiny, samples, arrange)
    return PeagleStep(tiny.config)(tiny.draft, batch, kit.context())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any]) -> None:
    tiny = kit.tiny(head_chunk=7, **options)
    samples = kit.samples(tiny.config, softcap=options.get("softcap"))
    weights = kit.weights64(tiny)
    want = kit.objective64(weights, tiny, samples)
    torch.autograd.backward(want.loss)
    for arrange in (pack, pad):
        out = run(kit, tiny, samples, arrange)
        close(out.loss_sum, want.loss, terms=TERMS)
        assert float(out.weight) == want.count > 5
        told = {name: ratio.num / ratio.den for name, ratio in out.metrics.items()}
        for depth, hits in enumerate(want.hits, 1):
            close(told.pop(f"accuracy_{depth}"), sum(hits) / len(hits), terms=1)
        close(told.pop("acceptance_rate"), sum(want.overlaps) / want.count, terms=TERMS)
        close(told.pop("in_draft_vocab"), want.count / want.supervised, terms=1)
        close(told.pop("acceptance_length"), sum(want.lengths) / len(want.lengths), terms=1)
        assert not told
        found = gradients(tiny.model, out.loss_sum)
        frozen = {"lm_head.weight"} if options.get("train_head") is False else set()
        if options.get("depths") == 1:
            frozen |= {"mask_hidden"}  # no element reads it
            found.pop("mask_hidden", None)
        assert found.keys() == weights.keys() - frozen
        for name, gradient in found.items():
            exact = weights[name].grad
            assert exact is not None
            error = (gradient.double() - exact).norm() / exact.norm()
            assert error < 1e-4, name


def test_a_batch_is_the_sum_of_its_samples(kit: Any) -> None:
    tiny = kit.tiny()
    samples = kit.samples(tiny.config, (13, 9, 5))
    alone = [run(kit, tiny, [sample]) for sample in samples]
    whole = run(kit, tiny, samples)
    close(whole.loss_sum, sum(part.loss_sum.double() for part in alone), terms=TERMS)
    for name, ratio in whole.metrics.items():
        total = sum(float(part.metrics[name].num) for part in alone)
        close(float(ratio.num), total, terms=TERMS, dtype=torch.float32)


def test_a_depth_reads_no_token_behind_its_row(kit: Any) -> None:
    """Neither what it is to predict, nor what comes before that."""
    tiny = kit.tiny(keep_ratio=1, draft_vocab_size="full")
    (sample,) = kit.samples(tiny.config, (13,))
    sample["loss_mask"].zero_()
    sample["loss_mask"][8] = 1
    depths = torch.zeros(13, dtype=torch.int64)
    sample["depths"] = depths.index_fill(0, torch.tensor([4]), 2)  # depth 2 predicts token 8

    def loss(**changed: Tensor) -> float:
        batch = kit.batch(tiny, [{**sample, **changed}])
        only = batch["depth"][batch["trained"]] == 2
        batch |= {name: batch[name][only] for name in ("trained", "labels")}
        return float(PeagleStep(tiny.config)(tiny.draft, batch, kit.context()).loss_sum.detach())

    before, ids = loss(), sample["input_ids"].clone()
    assert before > 0
    ids[6:] = 7
    states = sample["hidden_states"].clone()
    states[5:] += 3
    assert loss(input_ids=ids, hidden_states=states) == before
    ids[5] = (ids[5] + 1) % 20  # the token behind the row, which it reads
    assert loss(input_ids=ids) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("path", ["auto", "eager"])
def test_a_step_on_a_gpu_computes_the_same_and_never_waits(kit: Any, path: str) -> None:
    tiny = kit.tiny(attention=path, head_dim=16)
    samples = kit.samples(tiny.config, (90, 150, 7))
    want = run(kit, tiny, samples)
    exact = gradients(tiny.model, want.loss_sum)
    tiny.model.cuda()
    batch = {name: value.cuda() for name, value in kit.batch(tiny, samples).items()}
    tiny.frozen.cuda()
    tiny.frozen._rows = None
    step = PeagleStep(tiny.config)
    for _ in range(2):  # compiles kernels
        torch.autograd.backward(step(tiny.draft, batch, kit.context()).loss_sum)
    tiny.model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step(tiny.draft, batch, kit.context())
        torch.autograd.backward(out.loss_sum)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(out.loss_sum.cpu(), want.loss_sum.detach(), terms=TERMS)
    for name, parameter in tiny.model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad.cpu() - exact[name]).norm() / exact[name].norm()
        assert error < 1e-4, name
