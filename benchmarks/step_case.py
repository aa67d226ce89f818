"""The shapes, random drafts and correctness checks of step.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from specforge_dflash import build_draft
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from specforge_dflash.config import DFlashConfig
from specforge_dflash.step import DFlashStep
from torch import Tensor

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.types import Batch, Draft, StepContext, TargetInfo


@dataclass(frozen=True)
class Case:
    """One shape, and what is known about it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    layers: int
    anchors: int
    block: int
    length: int
    best_known_ms: float | None = None  # of other trainers, on an H100
    best_known_gib: float | None = None
    floor_ms: float | None = None

    @property
    def slots(self) -> int:
        return self.anchors * self.block


CASES = {"D1": Case(4096, 32, 8, 128, 12288, 151936, 5, 512, 16, 3072, 204.0, 17.9, 90.0)}
SMALL = Case(64, 4, 2, 16, 96, 512, 2, 12, 4, 96)
CHECK = Case(256, 4, 2, 64, 512, 2000, 2, 40, 16, 500)


def random_target(case: Any) -> TargetInfo:
    """Return the target of a case, which names its sizes as `Case` does."""
    sizes = {
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "intermediate_size": case.mlp,
        "rope_theta": 1e6,
    }
    return TargetInfo(
        name_or_path="random",
        revision=None,
        hidden_size=case.hidden,
        num_layers=36,
        vocab_size=case.vocab,
        config=sizes,
    )


def build(case: Case, device: str, dtype: torch.dtype, **options: Any) -> tuple[Draft, DFlashStep]:
    config = DFlashConfig.model_validate(
        {
            "name": "dflash",
            "block_size": case.block,
            "num_layers": case.layers,
            "num_anchors": case.anchors,
            "mask_token_id": case.vocab - 1,
            **options,
        }
    )
    target = random_target(case)
    gen = torch.Generator(device).manual_seed(0)
    embed, head = (
        torch.empty(case.vocab, case.hidden, device=device, dtype=dtype).normal_(
            std=0.02, generator=gen
        )
        for _ in range(2)
    )
    draft = build_draft(config, target, embed, head, mask_token_id=case.vocab - 1)
    draft.model.to(device=device, dtype=dtype)
    return draft, DFlashStep(config)


def random_batch(
    case: Case,
    step: DFlashStep,
    device: str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    documents: int = 1,
) -> Batch:
    """A packed row of documents of equal length, all supervised, as the loader gives it."""
    gen = torch.Generator().manual_seed(1)
    spec = capture_spec(tuple(range(case.layers)), case.hidden)
    transform = DFlashTransform(spec, case.length, step.config.num_anchors // documents)
    length, samples = case.length // documents, []
    for _ in range(documents):
        sample = {
            "input_ids": torch.randint(case.vocab - 1, (length,), generator=gen),
            "loss_mask": torch.ones(length, dtype=torch.uint8),
            "hidden_states": torch.randn(length, case.layers * case.hidden, generator=gen),
        }
        drawn = transform(sample, torch.Generator().manual_seed(seed))
        assert drawn is not None
        samples.append(drawn)
    batch = DFlashCollate(step.config, spec, case.vocab - 1)(samples)
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in batch.items()
    }


def context() -> StepContext:
    mesh: Any = None
    generator = torch.Generator().manual_seed(0)
    return StepContext(step=0, total_steps=1, generator=generator, training=True, mesh=mesh)


def backward(loss: Tensor, grad: Tensor | None = None) -> None:
    loss.backward(grad)  # type: ignore[no-untyped-call]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check_loss(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative errors of losses and hidden gradients against float64."""
    gen = torch.Generator().manual_seed(2)
    hidden = torch.randn(300, 128, generator=gen).to(device, dtype).requires_grad_()
    weight = torch.randn(9001, 128, generator=gen).mul(0.3).to(device, dtype)
    labels = torch.randint(9001, (300,), generator=gen).to(device)
    losses, best = linear_cross_entropy(hidden, weight, labels, chunk=128)
    backward(losses.sum())
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().t()
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    backward(want.sum())
    assert hidden.grad is not None
    assert exact.grad is not None
    top = logits.detach().amax(1)
    assert float((top - logits.detach().gather(1, best[:, None]).squeeze(1)).max()) < 0.2
    return relative(losses.detach(), want.detach()), relative(hidden.grad, exact.grad)


def check_paths(documents: int, **options: Any) -> float:
    """Return the largest relative difference of a gradient: bfloat16 kernels, float32 eager."""
    grads = []
    for attention, dtype in (("auto", torch.bfloat16), ("eager", torch.float32)):
        draft, step = build(CHECK, "cuda", dtype, attention=attention, **options)
        batch = random_batch(CHECK, step, "cuda", dtype, documents=documents)
        out = step(draft, batch, context())
        backward(out.loss_sum / out.weight)
        grads.append({n: p.grad for n, p in draft.model.named_parameters() if p.grad is not None})
    return max(relative(grads[0][name], grads[1][name]) for name in grads[1])


def check(device: str, dtype: torch.dtype) -> None:
    loss, grad = check_loss(device, dtype)
    print(f"check: loss against float64 {loss:.1e}, its gradient {grad:.1e}")
    assert loss < 5e-3
    assert grad < 2e-2
    if device == "cpu":
        print("check: the attention kernels need a GPU, skipped")
        return
    for name, window, documents in (("full", None, 1), ("sliding", 100, 1), ("full", None, 4)):
        error = check_paths(documents, sliding_window=window)
        print(f"check: {name} attention, {documents} documents, both paths' gradients {error:.1e}")
        assert error < 5e-2
