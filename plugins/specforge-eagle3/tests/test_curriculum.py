"""Less hard labels and fewer steps early in a run, against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from specforge_eagle3.adapter import trained_labels
from specforge_eagle3.curriculum import hard_share_at, steps_at
from specforge_eagle3.step import Eagle3Step
from torch import Tensor

from specforge_core.batches.collate import pack, pad
from specforge_core.testing.close import close


def hardest(tiny: Any, share: float) -> Callable[[dict[str, Tensor]], set[int]]:
    """Return what says a sample's labels of highest entropy, one by one."""
    tokens = (tiny.model.d2t + torch.arange(len(tiny.model.d2t))).tolist()
    softcap = tiny.model.shape.softcap

    def found(sample: dict[str, Tensor]) -> set[int]:
        asked = trained_labels(sample["loss_mask"], tiny.config.mask_on).tolist()
        entropy = {}
        for u, choice in enumerate(sample["target_argmax"].tolist()):
            if not asked[u] or choice not in tokens:
                continue
            scores = tiny.head.double()[tokens] @ sample["final"][u].double()
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            p = scores.softmax(-1)
            entropy[u] = float(-(p * p.log()).sum())
        kept = math.ceil(len(entropy) * (1 - share))
        return set(sorted(entropy, key=entropy.__getitem__)[kept:])

    return found


CASES: list[tuple[dict[str, Any], float, int, float]] = [
    ({"hard_share": 0.6}, 0.25, 3, 0.3),
    ({"hard_share": 0.5, "hard_until": 1.0, "mean_over": "supervised"}, 0.0, 3, 0.5),
    ({"hard_share": 0.5, "softcap": 3.0, "head_chunk": 2}, 0.0, 3, 0.5),
    ({"grow_steps": 0.6}, 0.1, 1, 0.0),
    ({"grow_steps": 0.6, "mean_over": "supervised", "norm_output": True}, 0.25, 2, 0.0),
    ({"grow_steps": 0.6, "hard_share": 0.8, "loss": "lk_lambda"}, 0.3, 2, 0.32),
    ({"grow_steps": 0.6, "hard_share": 0.8}, 0.6, 3, 0.0),
]


@pytest.mark.parametrize(("options", "progress", "steps", "share"), CASES)
def test_loss_gradients_and_metrics_are_the_formulas(
    kit: Any, options: dict[str, Any], progress: float, steps: int, share: float
) -> None:
    tiny = kit.tiny(torch.float64, **options)
    assert steps_at(tiny.config, progress) == steps
    close(hard_share_at(tiny.config, progress), share, terms=4)
    samples, step = kit.samples(softcap=options.get("softcap")), Eagle3Step(tiny.config)
    weights, hard = kit.weights64(tiny), hardest(tiny, share)
    assert any(map(hard, samples)) == (share > 0)
    exact = kit.objective64(weights, tiny, samples, steps, hard)
    exact.loss.backward()
    for arrange in (pack, pad):
        tiny.model.zero_grad()
        out = step(tiny.draft, kit.batch(tiny, samples, arrange), kit.context(progress=progress))
        loss = out.loss_sum / out.weight
        loss.backward()
        close(loss, exact.loss, terms=1, dtype=torch.float32)
        for name, parameter in tiny.model.named_parameters():
            close(parameter.grad, weights[name].grad, terms=1, dtype=torch.float32, name=name)
        told = {name: (float(r.num), float(r.den)) for name, r in out.metrics.items()}
        for k in range(3):
            right = exact.hits[k] if k < steps else []
            assert told[f"accuracy_{k + 1}"] == (sum(right), len(right))
        assert told["acceptance_length"] == (sum(exact.lengths), len(exact.lengths))


def test_any_split_of_a_batch_adds_up_and_validation_leaves_nothing_out(kit: Any) -> None:
    tiny = kit.tiny(torch.float64, hard_share=0.5, grow_steps=0.9)
    samples, step = kit.samples(), Eagle3Step(tiny.config)

    def loss(chosen: Any, **where: Any) -> Tensor:
        batch = kit.batch(tiny, chosen)
        found: Tensor = step(tiny.draft, batch, kit.context(**where)).loss_sum.detach()
        return found

    whole = loss(samples, progress=0.2)
    close(sum(loss([sample], progress=0.2) for sample in samples), whole, terms=3000)
    plain = loss(samples, progress=1.0)
    assert abs(float(plain - whole)) > 0.1
    assert float(loss(samples, progress=0.0, training=False)) == float(plain)
