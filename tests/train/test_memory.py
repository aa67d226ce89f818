"""What a run says whose device's memory does not suffice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from specforge_core.errors import RunError
from specforge_core.load import load_config
from specforge_core.train import memory
from specforge_core.train.run import train
from specforge_core.train.trainer import Trainer
from specforge_core.types import Draft

from ..runs import linear_run

TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def full(self: Trainer, *_: Any) -> NoReturn:
    raise torch.OutOfMemoryError(TORCHS)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            ("train.recompute=true",),
            "Try: train.batch_size=1 train.accumulate=4, which trains on the same samples a step",
        ),
        (
            ("train.batch_size=1", "data.max_length=500"),
            "Try: data.max_length=250, or the strategy's options that bound what it computes at a "
            "time: specforge check linear; or train.recompute=true",
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
        (memory.GRADIENTS, "Try: --nproc N on more GPUs"),
        (memory.STATES, "Try: train.optimizer_dtype=bfloat16, or --nproc N"),
        (memory.REST, "; or train.recompute=true"),
    ],
)
def test_the_advice_is_for_what_is_largest(
    largest: str, advice: str, tmp_path: Path, toy_target: Path
) -> None:
    run, _ = load_config(linear_run(tmp_path, toy_target), ())
    assert advice in memory._advice(largest, run)


@pytest.mark.parametrize("known", [None, {"states": 10**6}])
def test_what_is_expected_is_split_among_ranks_and_counts_the_larger_of_states_and_gradients(
    known: dict[str, int] | None, tmp_path: Path, toy_target: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    frozen = torch.nn.Linear(2, 3, bias=False)
    draft = Draft(model=model, frozen=frozen, shard=(model[0],))
    run, _ = load_config(linear_run(tmp_path, toy_target), ("train.accumulate=1",))
    found = memory.estimate(draft, [optimizer], None, known, run, 2, 2)
    weights, root = 32 + 32 + 8, 32 + 8
    assert found == {
        "the draft's weights in float32": 4 * weights // 2,
        memory.STATES: (8 * weights + 3 * 4) // 2,
        memory.FROZEN: 24,
        memory.TARGET: 0,
        memory.GATHERED: 2 * weights,
        # what a rank keeps of them, and of the root's a narrow copy and one in float32
        **(known or {memory.GRADIENTS: 4 * weights // 2 + 6 * root}),
    }
    alone, _ = load_config(linear_run(tmp_path, toy_target), ("train.shard_size=1",))
    copies = memory.estimate(draft, [optimizer], None, known, alone, 2, 2)
    assert copies["the draft's weights in float32"] == 4 * weights
    # with accumulation they are there while the states are
    assert copies[memory.GRADIENTS] >= 4 * weights
    again, _ = load_config(
        linear_run(tmp_path, toy_target), ("train.accumulate=1", "train.recompute=true")
    )
    two = replace(draft, shard=tuple(model))
    found = memory.estimate(two, [optimizer], None, {"states": 10**6}, again, 2, 2)
    # when the last of two units is made again the larger one's gradient may still be to come
    assert found[memory.GRADIENTS] == 4 * 32 // 2
