"""States arrive where the draft trains, whatever device the target computes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.batches.collate import pack, pad, pinned
from specforge_core.batches.loader import to_device
from specforge_core.load import load_config
from specforge_core.train.run import train

from ..runs import linear_run


def test_a_batch_leaves_the_targets_device_for_a_draft_on_the_cpu() -> None:
    """The meta device's tensors cannot be read, so that moving them is an error."""
    here = torch.arange(3)
    assert to_device({"input_ids": here}, torch.device("cpu"))["input_ids"] is here
    there = torch.empty(3, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        to_device({"input_ids": here, "states": there}, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arrange", [pack, pad])
def test_a_batch_for_a_gpu_is_made_where_the_gpu_copies_it_from(arrange: Any) -> None:
    samples = [{"states": torch.randn(n, 5).bfloat16()} for n in (3, 1, 7)]
    with pinned(True):
        batch = arrange(samples, {"states"})
    assert batch["states"].is_pinned()
    moved = to_device(batch, torch.device("cuda"))
    want = arrange(samples, {"states"})
    assert not want["states"].is_pinned()
    assert {n: x.cpu().tolist() for n, x in moved.items()} == {
        n: x.tolist() for n, x in want.items()
    }


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("target", "draft"), [("cuda", "cpu"), ("cpu", "cuda"), ("cpu", "cpu")])
def test_target_and_draft_on_unlike_devices(
    target: str, draft: str, tmp_path: Path, toy_target: Path
) -> None:
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    devices = (f"target.device={target}", f"train.device={draft}", "target.dtype=float32")
    config = load_config(linear_run(tmp_path, toy_target), (*devices, "train.log_every=1"))
    assert train(*config).step == 6
    logged = (config[0].output_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in logged if "loss" in json.loads(line)]
    assert losses[-1] < losses[0]
