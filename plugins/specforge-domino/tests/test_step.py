"""The objective against its formula, block by block and slot by slot in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_domino.step import DominoStep
from torch import Tensor

from specforge_core.testing.close import close
from specforge_core.types import StepOutput

from ...dflash_kit import slot_weights

WEIGHTINGS = ["decay", "uniform", "dpace", "dpace_confidence", "dpace_continuation"]
LAYOUTS = ["next_token", "same_position"]
# what fc, two layers, the GRU, the correction and the head sum over, then the labels of a batch
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 24) + 5 * 31 + 31 + 6 + 24 + 41 + 200
SHARE = 1 - 0.375  # of the base logits, at that part of the training


def reference(kit: Any, tiny: Any, model: Any, samples: Any, share: float) -> dict[str, Any]:
    """Loss, weight and metrics; every possible anchor is taken."""
    config = tiny.config
    first = 1 if config.label_layout == "same_position" else 0
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    right: list[bool] = []
    base_right: list[bool] = []
    lengths: list[int] = []
    for sample in samples:
        ids, mask, features = (sample[n] for n in ("input_ids", "loss_mask", "hidden_states"))
        for a in range(len(ids) - 1):
            if not (mask[a] and mask[a + 1]):
                continue
            states = kit.block_states(model, tiny, features, int(ids[a]), a)
            pairs: list[tuple[Tensor, Tensor] | None] = []
            hits: list[bool] = []
            for i in range(config.block_size - first):  # the i-th token after the anchor's
                place = a + i + 1
                if place >= len(ids) or not mask[place]:
                    pairs.append(None)
                    hits.append(False)
                    continue
                before = ids[a:place].tolist()
                base, final = kit.token_logits(model, tiny, states[i + first], before)
                label = int(ids[place])
                pairs.append((base.logsumexp(0) - base[label], final.logsumexp(0) - final[label]))
                hits.append(int(final.argmax()) == label)
                if i < config.block_size - 1:  # the token is drafted
                    right.append(hits[-1])
                    base_right.append(int(base.argmax()) == label)
            found = [None if p is None else float(p[1].detach()) for p in pairs]
            weights = slot_weights(config, config.gamma, found)
            for w, pair in zip(weights, pairs, strict=True):
                if pair is not None:
                    loss = loss + w * ((1 - share) * pair[1] + share * pair[0])
                    weight += w if config.weighting == "decay" else 1
            drafted = hits[: config.block_size - 1]
            lengths.append(1 + [*drafted, False].index(False))
    return {
        "loss": loss,
        "weight": weight,
        "accuracy": sum(right) / len(right),
        "base_accuracy": sum(base_right) / len(right),
        "acceptance_length": sum(lengths) / len(lengths),
        "base_share": share,
    }


def run(kit: Any, tiny: Any, samples: Any, **where: Any) -> StepOutput:
    batch = kit.batch(tiny.config, samples)
    return DominoStep(tiny.config)(tiny.draft, batch, kit.context(**where))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


CASES: list[dict[str, Any]] = [
    *({"weighting": w, "label_layout": x} for w in WEIGHTINGS for x in LAYOUTS),
    {"pure_draft_prefix_len": 0},
    {"pure_draft_prefix_len": 3, "label_layout": "same_position"},
    {"softcap": 4.0, "scale": 3.0},
    {"bias": True},
    {"sliding_window": 6, "weighting": "dpace", "dpace_alpha": 0.3},
]


@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_weight_metrics_and_gradients(kit: Any, options: dict[str, Any], batches: str) -> None:
    tiny = kit.tiny(head_chunk=7, batches=batches, **options)
    samples = kit.samples()
    out = run(kit, tiny, samples)
    model = kit.model64(tiny)
    want = reference(kit, tiny, model, samples, SHARE)
    close(out.loss_sum, want["loss"], terms=TERMS)
    close(float(out.weight), want["weight"], terms=200, dtype=torch.float32)
    for name in ("accuracy", "base_accuracy", "acceptance_length", "base_share"):
        ratio = out.metrics[name]
        close(float(ratio.num / ratio.den), want[name], terms=1, dtype=torch.float32)
    exact = gradients(model, want["loss"])
    for name, gradient in gradients(tiny.model, out.loss_sum).items():
        error = (gradient.double() - exact[name]).norm() / exact[name].norm()
        assert error < 1e-4, name


def test_a_batch_is_the_sum_of_its_samples_padded_or_packed(kit: Any) -> None:
    samples = kit.samples((19, 11, 7))
    alone = [run(kit, kit.tiny(), [sample]) for sample in samples]
    for batches in ("packed", "padded"):
        out = run(kit, kit.tiny(batches=batches), samples)
        for name, ratio in out.metrics.items():
            total = sum(float(p.metrics[name].num) for p in alone)
            close(float(ratio.num), total, terms=TERMS, dtype=torch.float32)
        total = sum(float(p.loss_sum.detach()) for p in alone)
        close(float(out.loss_sum.detach()), total, terms=TERMS, dtype=torch.float32)


def test_the_correction_reads_no_later_token_and_no_other_document(kit: Any) -> None:
    """What follows a label changes nothing that predicts it."""
    samples = kit.samples((19, 11))
    for sample in samples:
        sample["loss_mask"].zero_()
        sample["loss_mask"][3:6] = 1
    before = run(kit, kit.tiny(), samples).loss_sum
    samples[0]["input_ids"][6:] = 7
    samples[0]["hidden_states"][6:] += 5
    assert float(run(kit, kit.tiny(), samples).loss_sum.detach()) == float(before.detach())
    samples[0]["input_ids"][3] = 7
    assert float(run(kit, kit.tiny(), samples).loss_sum.detach()) != float(before.detach())


@pytest.mark.parametrize(("decay", "shares"), [(1.0, [1.0, 0.75, 0.0]), (0.5, [1.0, 0.5, 0.0])])
def test_the_loss_moves_to_the_corrected_logits(
    kit: Any, decay: float, shares: list[float]
) -> None:
    tiny = kit.tiny(base_loss_decay=decay)
    samples = kit.samples()
    for progress, share in zip((0.0, 0.25, 1.0), shares, strict=True):
        out = run(kit, tiny, samples, progress=progress)
        close(float(out.metrics["base_share"].num / out.weight), share, terms=1)
        want = reference(kit, tiny, kit.model64(tiny), samples, share)["loss"]
        close(out.loss_sum, want, terms=TERMS)
    validated = run(kit, tiny, samples, progress=0.0, training=False)
    assert float(validated.metrics["base_share"].num) == 0
    close(validated.loss_sum, want, terms=TERMS)  # as at the end of a run


def test_a_batch_without_anchors_has_zero_loss_and_gradients(kit: Any) -> None:
    """A rank whose samples have none must still take part in every collective."""
    from specforge_dflash.adapter import capture_spec, with_final
    from specforge_dflash.collate import DFlashCollate

    tiny = kit.tiny(weighting="dpace")
    none = torch.empty(0, dtype=torch.int64)
    samples = [{**sample, "anchors": none} for sample in kit.samples()]
    collate = DFlashCollate(tiny.config, with_final(capture_spec((1, 5), 24), 24), 40)
    out = DominoStep(tiny.config)(tiny.draft, collate(samples), kit.context())
    assert not any(gradient.any() for gradient in gradients(tiny.model, out.loss_sum).values())
    assert float(out.loss_sum.detach()) == float(out.weight) == 0.0


def test_a_draft_learns_one_batch_by_heart(kit: Any) -> None:
    tiny, samples = kit.tiny(base_loss_decay=0.2), kit.samples()
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    for _ in range(40):
        out = run(kit, tiny, samples)
        optimizer.zero_grad()
        torch.autograd.backward(out.loss_sum / out.weight)
        optimizer.step()
    assert float(out.metrics["accuracy"].num / out.metrics["accuracy"].den) > 0.95


def test_blocks_that_leave_nothing_to_correct_are_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match="leaves none of the 2 drafted tokens to correct"):
        kit.config(block_size=3, pure_draft_prefix_len=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_a_step_on_a_gpu_computes_the_same_and_never_waits(kit: Any, weighting: str) -> None:
    tiny = kit.tiny(attention="eager", weighting=weighting, softcap=6.0)
    samples = kit.samples()
    want = run(kit, tiny, samples)
    exact = gradients(tiny.model, want.loss_sum)
    tiny.model.zero_grad()
    tiny.model.cuda()
    tiny.frozen.cuda()
    batch = {name: value.cuda() for name, value in kit.batch(tiny.config, samples).items()}
    step = DominoStep(tiny.config)
    step(tiny.draft, batch, kit.context())  # compiles kernels
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
