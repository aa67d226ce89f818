"""A trace of some steps, and what it says of a GPU's time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from specforge_core.testing.runs import load
from specforge_core.train.run import train
from specforge_core.train.trace import Shares, Span, Trace, shares

from ..runs import linear_run


def test_time_is_computing_waiting_for_others_or_nothing() -> None:
    spans = [
        Span(0.0, 4.0, "gemm"),
        Span(1.0, 3.0, "norm"),  # beside the first, on another stream
        Span(3.0, 6.0, "ncclDevKernel_AllGather"),  # alone from 4 on
        Span(8.0, 10.0, "gemm"),
    ]
    assert shares(reversed(spans)) == pytest.approx(Shares(0.6, 0.2, 0.2))
    assert shares([]) is None


def test_the_steps_behind_the_first_ten_are_traced(
    tmp_path: Path, toy_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    config = linear_run(tmp_path, toy_target)
    train(*load(config, "train.max_steps=14", "train.trace_steps=2"))
    path = tmp_path / "run/trace-11.json.gz"
    assert f"{path} has a trace of steps 11 to 12. " in capsys.readouterr().err.replace("\n", " ")
    names = [
        event.get("name", "")
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ]
    assert {"ProfilerStep#9", "ProfilerStep#10"} == {
        n for n in names if n.startswith("ProfilerStep")
    }
    assert any("backward" in name.lower() for name in names)


@pytest.mark.parametrize(
    ("last", "told"),
    [(9, "before step 11"), (10, "before step 11"), (11, "11 to 11"), (15, "11 to 13")],
)
def test_a_run_that_ends_early_says_what_is_traced(
    last: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = Trace(3, tmp_path, torch.device("cpu"))
    for number in range(1, last + 1):
        torch.ones(1) + 1
        trace.step(number)
    trace.close()
    assert told in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "trace-11.json.gz").exists() == ("to" in told)


@pytest.mark.gpu
def test_a_gpus_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    trace = Trace(2, tmp_path, torch.device("cuda"))
    x = torch.ones(512, 512, device="cuda")
    for number in range(1, 14):
        x = (x @ x).clamp(-1, 1)
        trace.step(number)
    trace.close()
    told = capsys.readouterr().err.replace("\n", " ")
    assert "the GPU computed" in told
    assert "other ranks 0.0%" in told
