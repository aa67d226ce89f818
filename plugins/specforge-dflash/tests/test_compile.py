"""Layers are compiled once for all lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_dflash.step import DFlashStep
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from specforge_core.compiled import CACHE, compile_units
from specforge_core.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))


def ragged(kit: Any, tiny: Any, number: int) -> Batch:
    """One to three documents of any length."""
    gen = torch.Generator().manual_seed(number)
    count = 1 + number % 3
    lengths = tuple(torch.randint(12, 1500 // count, (count,), generator=gen).tolist())
    batch: Batch = kit.batch(tiny.config, kit.samples(lengths))
    return batch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_batches_of_any_length_share_a_graph(kit: Any) -> None:
    """By flex attention, whose mask is as general on a CPU; it has no backward pass there."""
    tiny = kit.tiny(attention="flex")
    torch.compiler.reset()
    counter = CompileCounter()
    compile_units(tiny.draft.compiled, counter)
    with torch.no_grad():
        for number in range(8):
            DFlashStep(tiny.config)(tiny.draft, ragged(kit, tiny, number), kit.context())
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_no_length_compiles_again_on_a_gpu(
    kit: Any, batches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 ragged steps, wider apart than the sizes torch would choose its kernels by.

    Triton would compile a kernel once more for a count that is a multiple of 16.
    """
    from specforge_dflash import triton_attention, triton_attention_backward as backward
    from triton import knobs

    for kernel in (triton_attention.forward, backward.queries, backward.keys):
        kernel.device_caches.clear()  # of another test in this process
    compiled: list[str] = []
    hook = lambda *, repr, **_: compiled.append(repr)  # noqa: E731
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    tiny = kit.tiny(head_dim=16, batches=batches, sliding_window=40, num_anchors=600)
    tiny.model.cuda()
    tiny.frozen.cuda()
    torch.compiler.reset()
    counters.clear()
    compile_units(tiny.draft.compiled)
    step, seen = DFlashStep(tiny.config), []
    begun = 0
    for number in range(200):
        if number == 12:  # padded batches of one row are a graph of their own
            begun = len(compiled)
        batch = {n: x.cuda() for n, x in ragged(kit, tiny, number).items()}
        seen.append(batch["anchors"].numel() * tiny.config.block_size)
        torch.autograd.backward(step(tiny.draft, batch, kit.context()).loss_sum)
    assert max(seen) > 2000
    assert min(seen) < 200
    assert begun
    assert compiled[begun:] == []
    # a padded batch of one row is a graph of its own
    assert 1 <= counters["stats"]["unique_graphs"] <= (2 if batches == "packed" else 3)
