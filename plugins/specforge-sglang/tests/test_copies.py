"""Copies hold what the tensors held, whatever is done with them meanwhile."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from specforge_sglang_capture import copies
from specforge_sglang_capture.copies import Copier
from torch import Tensor

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def tensors(device: str, rows: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    wide = torch.randn(2 * rows, 48, generator=draw)
    return [
        torch.arange(rows, device=device) + seed,
        wide[rows:].to(device, torch.bfloat16),
        wide.to(device)[::2],  # not contiguous
        torch.randn(3, rows, generator=draw).to(device),
    ]


@on_each_device
def test_every_request_gets_its_own_tensors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "GROUP_BYTES", 5000)  # several groups, some of one request
    requests = [tensors(device, rows, rows) for rows in (1, 7, 300, 2, 3, 5)]
    pending = Copier().begin(requests)
    assert len({p.group.data_ptr() for p in pending}) == 3
    for request, one in zip(requests, pending, strict=True):
        found = one.wait()
        for tensor, copy in zip(request, found, strict=True):
            assert copy.is_contiguous()
            assert copy.device.type == "cpu"
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor.cpu())


@on_each_device
def test_tensors_may_be_overwritten_at_once(device: str) -> None:
    copier = Copier()
    for seed in range(20):
        made = tensors(device, 1000, seed)
        expected = [tensor.cpu().clone() for tensor in made]
        (pending,) = copier.begin([made])
        for tensor in made:
            tensor.fill_(-1)
        del made, tensor
        # takes the memory that was just freed
        noise = [torch.full((1000, 48), 7.0, device=device) for _ in range(8)]
        assert all(map(torch.equal, pending.wait(), expected))
        del noise


def test_nothing_to_copy() -> None:
    assert Copier().begin([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_waits_neither_for_the_model_nor_it_for_the_copy() -> None:
    copier, sleep = Copier(), 1_000_000_000  # cycles: about half a second
    state = torch.randn(20_000, 2048, device="cuda")
    expected = state.cpu() * 2
    copier.begin([[state]])[0].wait()  # pinned memory and stream are there
    done: Any = torch.cuda.Event()
    torch.cuda._sleep(sleep)
    state.mul_(2)  # what the model has yet to do when the copy is begun
    start = time.perf_counter()
    (pending,) = copier.begin([[state]])
    begun = time.perf_counter() - start
    state.zero_()
    torch.cuda._sleep(sleep)  # the next batch
    done.record()
    assert not done.query()
    assert begun < 0.1
    assert torch.equal(pending.wait()[0], expected)
    assert not done.query()  # it came while the next batch was running
    torch.cuda.synchronize()
