"""Both paths of attention against each other, and what they keep in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_eagle3.attention import KeyValue, attend
from specforge_eagle3.rows import Documents
from specforge_eagle3.step import Eagle3Step
from torch import Tensor

LENGTHS = [1, 17, 6, 40]
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def on_gpu(test: Any) -> Any:
    for mark in GPU:
        test = mark(test)
    return test


def inputs(
    own: int, device: str, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, d: int = 16
) -> tuple[Tensor, list[Tensor]]:
    gen = torch.Generator().manual_seed(own)
    n = sum(LENGTHS)
    q = torch.randn(n, heads, d, generator=gen)
    kv = [torch.randn(n, kv_heads, d, generator=gen) for _ in range(2 + 2 * own)]
    return q.to(device, dtype).requires_grad_(), [x.to(device, dtype).requires_grad_() for x in kv]


def run(path: str, q: Tensor, kv: list[Tensor], docs: Documents) -> list[Tensor]:
    pairs: list[KeyValue] = [(kv[i], kv[i + 1]) for i in range(0, len(kv), 2)]
    out = attend(q, pairs[0], pairs[1:], docs, path)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), [q, *kv])
    return [out.detach(), *grads]


@on_gpu
@pytest.mark.parametrize("own", [0, 1, 2, 6])
@pytest.mark.parametrize("d", [16, 24])
def test_both_paths_give_the_same_with_gradients(own: int, d: int) -> None:
    """The kernels in bfloat16, the plain form in float64."""
    q, kv = inputs(own, "cuda", torch.bfloat16, d=d)
    docs = Documents.of_lengths(LENGTHS, "cuda")
    flash = run("auto", q, kv, docs)
    wide = q.detach().double().requires_grad_(), [x.detach().double().requires_grad_() for x in kv]
    for one, other in zip(flash, run("auto", *wide, docs), strict=True):
        # of the norm: bfloat16 rounds what goes in and what comes out to 2^-8
        assert float((one.double() - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("own", [0, 3])
def test_bfloat16_on_a_cpu_is_near(own: int) -> None:
    q, kv = inputs(own, "cpu", torch.bfloat16)
    docs = Documents.of_lengths(LENGTHS, "cpu")
    wide = q.detach().double().requires_grad_(), [x.detach().double().requires_grad_() for x in kv]
    for one, other in zip(run("auto", q, kv, docs), run("auto", *wide, docs), strict=True):
        # of the norm: bfloat16 rounds what goes in and what comes out to 2^-8
        assert float((one.double() - other).norm() / other.norm()) < 1e-2


def test_positions_begin_again_in_each_document() -> None:
    docs = Documents.of_lengths([2, 3], "cpu")
    assert docs.positions.tolist() == [0, 1, 0, 1, 2]
    assert docs.bounds.tolist() == [0, 2, 5]
    assert docs.longest == 3
    assert docs.visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def saved_bytes(kit: Any, steps: int, length: int, attention: str) -> int:
    """Bytes of different storages that a training step keeps for its backward."""
    tiny = kit.tiny(torch.bfloat16, steps=steps, attention=attention)
    tiny.draft.model.cuda()
    tiny.draft.frozen.cuda()
    batch = kit.batch(tiny, kit.samples((length,)))
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    storages: dict[int, int] = {}
    keep = []

    def note(t: Tensor) -> Tensor:
        keep.append(t)  # so that no address is used twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        Eagle3Step(tiny.config)(tiny.draft, batch, kit.context())
    return sum(storages.values())


@on_gpu
def test_memory_is_linear_in_steps_and_in_length(kit: Any) -> None:
    by_step = [saved_bytes(kit, steps, 64, "auto") for steps in (2, 3, 4, 7, 8)]
    first, second, last = by_step[1] - by_step[0], by_step[2] - by_step[1], by_step[4] - by_step[3]
    # the number of labels per step is one fewer each time; own keys are shared, not copied
    assert second == pytest.approx(first, rel=0.05)
    assert last == pytest.approx(first, rel=0.05)
    short, double = (saved_bytes(kit, 4, length, "auto") for length in (200, 400))
    assert double < 2.1 * short
    # and the eager path, which is not, shows that this measures it
    assert saved_bytes(kit, 4, 400, "eager") > 3 * double
