"""What a run says whose device's memory does not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from specforge_core.errors import RunError
from specforge_core.load import load_config
from specforge_core.train import memory
from specforge_core.train.run import train
from specforge_core.train.trainer import Trainer

from ..runs import linear_run

TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def full(self: Trainer, *_: Any) -> NoReturn:
    raise torch.OutOfMemoryError(TORCHS)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ((), "Try: train.batch_size=1 train.accumulate=4, which trains on the same samples a step"),
        (
            ("train.batch_size=1", "data.max_length=500"),
            "Try: data.max_length=250, or the strategy's options that bound what it computes at a "
            "time: specforge check linear",
        ),
    ],
)
def test_a_full_device_is_told_by_what_fills_it(
    options: tuple[str, ...],
    advice: str,
    tmp_path: Path,
    toy_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "_forward", full)
    with pytest.raises(RunError) as raised:
        train(*load_config(linear_run(tmp_path, toy_target), options))
    text = str(raised.value)
    assert text.startswith("there is too little memory on cpu: ")
    assert f". {advice}\n{TORCHS}" in text
    assert ": the target 256 KB, the draft's weights in float32 34.3 KB. " in text
    assert "gradients" not in text  # there are none yet


def test_each_part_is_counted_where_it_is(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    draft: Any = type("Draft", (), {"model": model, "frozen": torch.nn.Linear(2, 3, bias=False)})
    engine: Any = type("Engine", (), {"model": torch.nn.Linear(5, 7, bias=False)})
    found = memory.parts(draft, [optimizer], engine, torch.device("cpu"))
    assert list(found.values()) == [128, 128, 2 * 128 + 4, 24, 140]
    assert sum(memory.parts(draft, [optimizer], engine, torch.device("cuda")).values()) == 0


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        (memory.TARGET, "data.capture_dir=DIR; or target.device=cuda:1"),
        ("their gradients", "--nproc N on more GPUs"),
    ],
)
def test_the_advice_is_for_what_is_largest(
    largest: str, advice: str, tmp_path: Path, toy_target: Path
) -> None:
    run, _ = load_config(linear_run(tmp_path, toy_target), ())
    assert advice in memory._advice(largest, run)
