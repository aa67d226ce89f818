"""Case E1's shapes, data and draft, and what has to be right before anything is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from specforge_eagle3 import build_draft, specforge_collate
from specforge_eagle3.attention import attend
from specforge_eagle3.config import Eagle3Config, draft_shape
from specforge_eagle3.rows import Documents
from specforge_eagle3.step import Eagle3Step
from specforge_eagle3.vocab import offsets
from step_case import random_target
from torch import Tensor

from specforge_core.batches.loader import to_device
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.nn.soft_loss import SoftLoss
from specforge_core.types import Batch, Draft, StepContext


@dataclass(frozen=True)
class Case:
    """One shape, and what is known about it: milliseconds and GiB on an H100."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    draft_vocab: int
    steps: int
    length: int
    best_known: tuple[tuple[float, float], tuple[float, float]] | None = None  # trained, frozen
    floor_ms: float | None = None


E1 = Case(4096, 32, 8, 128, 12288, 151936, 32000, 7, 2048, ((95.0, 8.2), (78.6, 5.9)), 38.8)
SMALL = Case(64, 4, 2, 16, 96, 500, 128, 4, 96)
CHECK = Case(256, 4, 2, 64, 512, 2000, 800, 4, 300)


def build(case: Case, device: str, dtype: torch.dtype, **options: Any) -> tuple[Draft, Eagle3Step]:
    fields = {"name": "eagle3", "steps": case.steps, "draft_vocab_size": case.draft_vocab}
    config = Eagle3Config.model_validate({**fields, **options})
    target = random_target(case)
    gen = torch.Generator(device).manual_seed(0)
    shape = (case.vocab, case.hidden)
    embed = torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=gen)
    head = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    tokens = torch.arange(case.draft_vocab) * (case.vocab // case.draft_vocab)
    draft = build_draft(config, draft_shape(config, target), embed, lambda: head, offsets(tokens))
    draft.model.to(device=device, dtype=dtype)
    return draft, Eagle3Step(config)


def random_batch(
    case: Case, draft: Draft, step: Eagle3Step, dtype: torch.dtype, documents: int = 1
) -> Batch:
    """Return what the collate makes of random samples, on the draft's device."""
    gen = torch.Generator().manual_seed(1)
    samples = []
    for length in torch.arange(case.length).tensor_split(documents):
        n = len(length)
        chosen = torch.randint(case.draft_vocab, (n,), generator=gen)
        samples.append(
            {
                "input_ids": torch.randint(case.vocab, (n,), generator=gen),
                "loss_mask": torch.ones(n, dtype=torch.uint8),
                "hidden_states": torch.randn(n, 3 * case.hidden, generator=gen).to(dtype),
                "final": torch.randn(n, case.hidden, generator=gen).to(dtype),
                "target_argmax": chosen * (case.vocab // case.draft_vocab),
                # about what random states and this head give
                "target_logsumexp": torch.full((n,), math.log(case.vocab)),
            }
        )
    model: Any = draft.model
    return to_device(specforge_collate(step.config, draft)(samples), model.t2d.device)


def backward(loss: Tensor, grad: Tensor | None = None) -> None:
    loss.backward(grad)  # type: ignore[no-untyped-call]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- correctness -----------------------------------------------------------


def check_loss(device: str, dtype: torch.dtype, loss: SoftLoss) -> float:
    """Return the largest relative error of loss and gradients against float64 on the CPU's path."""
    gen = torch.Generator().manual_seed(2)
    scales = {"hidden": (60, 5, 128), "weight": (9001, 128), "teacher_hidden": (60, 128)}
    given = {n: torch.randn(s, generator=gen) * 0.3 for n, s in scales.items()}
    given["teacher_weight"] = torch.randn(9001, 128, generator=gen) * 0.3
    given["row_weights"] = torch.rand(60, 5, generator=gen)
    results = []
    for place, kind in ((device, dtype), ("cpu", torch.float64)):
        # both start from what the narrow dtype holds
        own = {n: t.to(dtype).to(place, kind).detach().clone() for n, t in given.items()}
        whole = torch.full((60,), 10.0, device=place)  # the 9001 tokens are half of them, or less
        leaves = [own[n].requires_grad_() for n in ("hidden", "weight")]
        total, rows = linear_soft_cross_entropy(
            **own, loss=loss, teacher_softcap=4.0, teacher_logsumexp=whole, chunk=64
        )
        backward(total)
        results.append([total.detach(), rows.overlaps, *(leaf.grad for leaf in leaves)])
    pairs = zip(*results, strict=True)
    return max(relative(a.cpu(), b) for a, b in pairs if a is not None and b is not None)


def check_step(**options: Any) -> float:
    """Return the largest relative difference of a gradient: flash in bfloat16, eager in float32."""
    grads = []
    for attention, dtype in (("auto", torch.bfloat16), ("eager", torch.float32)):
        draft, step = build(CHECK, "cuda", dtype, attention=attention, **options)
        out = step(draft, random_batch(CHECK, draft, step, dtype, documents=3), context())
        backward(out.loss_sum / out.weight)
        grads.append({n: p.grad for n, p in draft.model.named_parameters() if p.grad is not None})
    return max(relative(grads[0][name], grads[1][name]) for name in grads[1])


def check_attention(device: str) -> float:
    """Return the largest relative error of merged attention, packed documents, own terms 0 to 6."""
    docs = Documents.of_lengths([1, 130, 57, 300], device)
    gen = torch.Generator().manual_seed(3)
    errors = []
    for own in (0, 1, 6):
        drawn = [torch.randn(488, h, 64, generator=gen) for h in (8, *(2,) * (2 + 2 * own))]
        found = []
        for path, dtype in (("auto", torch.bfloat16), ("eager", torch.float64)):
            x = [t.bfloat16().to(device, dtype).requires_grad_() for t in drawn]
            pairs = [(x[i], x[i + 1]) for i in range(1, len(x), 2)]
            out = attend(x[0], pairs[0], pairs[1:], docs, path)
            backward(out.square().sum())
            found.append([out.detach(), *(t.grad for t in x)])
        both = zip(*found, strict=True)
        errors += [relative(a, b) for a, b in both if a is not None and b is not None]
    return max(errors)


def check(device: str, dtype: torch.dtype) -> None:
    for loss in (SoftLoss(), SoftLoss("log_overlap"), SoftLoss("hybrid")):
        error = check_loss(device, dtype, loss)
        print(f"check: {loss.objective} and its gradients against float64 {error:.1e}")
        # the overlap's gradient jumps where teacher and student tie: rounding to bfloat16 takes
        # some of its tokens across, 4e-2 of it, also on the CPU's plain path
        assert error < (2e-2 if loss.objective == "cross_entropy" else 6e-2)
    error = check_attention(device)
    print(f"check: merged attention against eager float64 {error:.1e}")
    assert error < 2e-2
    if device == "cpu":
        return
    for options in ({}, {"norm_output": True, "fc_norm": True, "layer_type": "qwen3"}):
        error = check_step(**options)
        print(f"check: step {options}, both paths' gradients {error:.1e}")
        assert error < 5e-2


def context() -> StepContext:
    mesh: Any = None  # one process
    return StepContext(step=0, total_steps=1, generator=torch.Generator(), training=True, mesh=mesh)
