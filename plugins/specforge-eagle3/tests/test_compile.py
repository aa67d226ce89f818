"""The layer's two halves are compiled once for all lengths, and so are its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_eagle3.step import Eagle3Step
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from specforge_core.batches.loader import to_device
from specforge_core.compiled import CACHE, compile_units

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))


@pytest.mark.slow
def test_batches_of_any_length_share_a_graph(kit: Any) -> None:
    """Also where a step's view of the embeddings begins as far in as a row is wide."""
    tiny = kit.tiny()
    torch.compiler.reset()
    counter = CompileCounter()
    compile_units(tiny.draft.compiled, counter)
    for lengths in ((40, 7), (23,), (16, 16, 16), (61, 5)):
        out = Eagle3Step(tiny.config)(
            tiny.draft, kit.batch(tiny, kit.samples(lengths)), kit.context()
        )
        torch.autograd.backward(out.loss_sum)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_no_length_compiles_again_on_a_gpu(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would compile a kernel once more for a count that is a multiple of 16."""
    from specforge_eagle3 import triton_own
    from triton import knobs

    for kernel in (triton_own._merge, triton_own._merge_backward):
        kernel.device_caches.clear()  # of another test in this process
    compiled: list[str] = []
    hook = lambda *, repr, **_: compiled.append(repr)  # noqa: E731
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    tiny = kit.tiny(torch.bfloat16)
    draft, step = tiny.draft, Eagle3Step(tiny.config)
    draft.model.cuda()
    draft.frozen.cuda()
    torch.compiler.reset()
    counters.clear()
    compile_units(draft.compiled)
    for number in range(100):
        lengths = (33 + number % 40, 15, 17) if number else (50, 17)
        batch = to_device(kit.batch(tiny, kit.samples(lengths)), torch.device("cuda"))
        torch.autograd.backward(step(draft, batch, kit.context()).loss_sum)
        if not number:
            first = len(compiled)
    assert first
    assert compiled[first:] == []
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
