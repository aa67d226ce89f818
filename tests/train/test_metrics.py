from __future__ import annotations

import json
from pathlib import Path

import torch

from specforge_core.train import metrics
from specforge_core.train.dist import world
from specforge_core.types import Ratio, StepOutput


def output(loss: float, weight: float, hits: float, seen: float) -> StepOutput:
    t = torch.tensor
    return StepOutput(
        loss_sum=t(loss), weight=t(weight), metrics={"accuracy": Ratio(num=t(hits), den=t(seen))}
    )


def test_micro_batches_are_summed_then_divided_once() -> None:
    outputs = [output(6.0, 3.0, 1.0, 2.0), output(1.0, 1.0, 0.0, 6.0)]
    with world(torch.device("cpu")):
        sums, counts = metrics.reduce(outputs, [70, 1], torch.device("cpu"))
    assert sums.ratios() == {"loss": 7 / 4, "accuracy": 1 / 8}
    assert counts == [70, 1]
    other = metrics.Sums({"loss": (1.0, 4.0), "never": (0.0, 0.0)})
    sums.merge(other)
    assert sums.ratios() == {"loss": 1.0, "accuracy": 1 / 8}


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        metrics.append(tmp_path, step, {"loss": float(step)})
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 4')
    metrics.rewind(tmp_path, 20)
    lines = (tmp_path / metrics.METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]
