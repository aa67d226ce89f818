"""Sums over ranks and steps, divided once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from ..types import StepOutput

METRICS = "metrics.jsonl"


@dataclass(slots=True)
class Sums:
    """Numerators and denominators by metric name; "loss" is the loss."""

    values: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, num: float, den: float) -> None:
        """Add one part."""
        old = self.values.get(name, (0.0, 0.0))
        self.values[name] = (old[0] + num, old[1] + den)

    def merge(self, other: Sums) -> None:
        """Add all parts of another."""
        for name, (num, den) in other.values.items():
            self.add(name, num, den)

    def ratios(self) -> dict[str, float]:
        """Return each metric; one that saw nothing is left out."""
        return {name: num / den for name, (num, den) in self.values.items() if den}


def reduce(
    outputs: list[StepOutput], counts: list[int], device: torch.device
) -> tuple[Sums, list[int]]:
    """Sum one step's micro-batches and the `counts` over all ranks, in one all_reduce.

    In float64, so that counts stay exact.
    """
    names = sorted(outputs[0].metrics)
    rows = []
    for output in outputs:
        parts = [output.loss_sum.detach(), output.weight]
        for name in names:
            parts += [output.metrics[name].num, output.metrics[name].den]
        rows.append(torch.stack([p.detach().to(device, torch.float64) for p in parts]))
    total = torch.stack(rows).sum(0)
    total = torch.cat([total, torch.tensor(counts, dtype=torch.float64, device=device)])
    dist.all_reduce(total)
    values = total.tolist()
    sums = Sums()
    for i, name in enumerate(["loss", *names]):
        sums.add(name, values[2 * i], values[2 * i + 1])
    return sums, [int(v) for v in values[len(values) - len(counts) :]]


def append(output_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line to the run's metrics.jsonl."""
    with (output_dir / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def rewind(output_dir: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run will write again."""
    path = output_dir / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # torn by a kill
        if row["step"] > step:
            break
        kept.append(line + "\n")
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
