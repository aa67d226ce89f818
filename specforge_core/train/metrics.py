"""Sums over ranks and steps, divided once; and where they are written."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..claim import METRICS as METRICS
from ..errors import PluginError, RunError
from ..evaluate.curves import TOO_LARGE, whole_lines
from ..files import append, refusing, write_file
from ..progress import console
from ..records import in_message
from ..stop import Interrupted
from ..text import counted, cut, line_of, said
from ..types import RESERVED_METRICS, StepOutput, Tracker

RESTART = "The checkpoints before it are whole. Make room there, then start the same command again"
MEASURED = ("validation/", "acceptance/", "eval/")  # lines of measurements hold these and the step
RESERVED_PREFIXES = ("seconds_", *MEASURED)


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


class Reduced:
    """Sums over the ranks, on the device at once and on the host when it has come there."""

    def __init__(
        self,
        package: str,
        names: tuple[str, ...],
        kinds: tuple[bool, ...],
        total: Tensor,
        told: set[str],
    ) -> None:
        self._package, self._names, self._kinds, self._told = package, names, kinds, told
        self._sums, self._extra = total[: 2 * len(names)], total[2 * len(names) :]
        self._host = total.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if total.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def loss(self) -> Tensor:
        """The summed loss, a scalar on the device."""
        return self._sums[0]

    @property
    def weight(self) -> Tensor:
        """The loss's weight, a scalar on the device."""
        return self._sums[1]

    @property
    def last(self) -> Tensor:
        """The last of `extra`, a scalar on the device."""
        return self._extra[-1]

    def read(self) -> tuple[Sums, list[float]]:
        """Return the sums, and each of `extra`.  Waits until the device has come so far.

        A metric that came to no number is left out, and told of once.
        """
        if self._copied is not None:
            self._copied.synchronize()
        values = self._host.tolist()
        sums = Sums()
        for i, name in enumerate(self._names):
            sums.add(name, values[2 * i], values[2 * i + 1])
        if sums.values["loss"][1] < 0:
            raise PluginError(
                f"{self._package}, specforge_train_step: the weights of a step come to "
                f"{sums.values['loss'][1]:g}, which would turn its gradient round. A weight is 0 "
                "or more: how many places the loss is summed over"
            )
        if _is_number(*sums.values["loss"]):  # else the whole step is left out, and told of
            for name in self._names[1:]:
                if not _is_number(*sums.values[name]):
                    self._leave_out(name, *sums.values.pop(name))
        rest = values[2 * len(self._names) :]
        found = iter(rest), iter(rest[self._kinds.count(False) :])  # numbers come before tensors
        return sums, [next(found[kind]) for kind in self._kinds]

    def _leave_out(self, name: str, num: float, den: float) -> None:
        if name not in self._told and dist.get_rank() == 0:
            console.print(
                f"warning: {self._package}, specforge_train_step: the metric {name!r} came to "
                f"{num:g} / {den:g}. It is left out wherever that is so; this is said once"
            )
        self._told.add(name)


def _is_number(num: float, den: float) -> bool:
    """Say whether a ratio, and sums that it is a part of, can be written and read as numbers."""
    ratio = num / den if den else 0.0
    return all(abs(value) < TOO_LARGE for value in (num, den, ratio))  # a NaN is not


@dataclass(slots=True)
class Reducer:
    """Sums what the ranks' micro-batches came to, in one all_reduce a step.

    Raises PluginError, naming the package, for metrics that the core or another rank cannot add.
    """

    package: str
    device: torch.device
    names: list[str] | None = None  # of the first step, the same on every rank
    told: set[str] = field(default_factory=set)  # metrics that came to no number

    def reduce(self, outputs: Sequence[StepOutput], extra: Sequence[Tensor | float]) -> Reduced:
        """Sum the outputs and each of `extra` over the ranks, without waiting for the device.

        In float64, so that counts stay exact.
        """
        names = self._names(outputs)
        rows = []
        for output in outputs:
            parts = [output.loss_sum, output.weight]
            for name in names:
                parts += [output.metrics[name].num, output.metrics[name].den]
            rows.append(torch.stack([p.detach().to(self.device, torch.float64) for p in parts]))
        numbers = [e for e in extra if not isinstance(e, Tensor)]
        tensors = [
            e.detach().to(self.device, torch.float64) for e in extra if isinstance(e, Tensor)
        ]
        pinned = torch.tensor(numbers, dtype=torch.float64)
        if self.device.type == "cuda":
            pinned = pinned.pin_memory().to(self.device, non_blocking=True)
        total = torch.cat([torch.stack(rows).sum(0), pinned, *(t.reshape(1) for t in tensors)])
        dist.all_reduce(total)
        kinds = tuple(isinstance(e, Tensor) for e in extra)
        return Reduced(self.package, ("loss", *names), kinds, total, self.told)

    def _names(self, outputs: Sequence[StepOutput]) -> list[str]:
        hook = f"{self.package}, specforge_train_step: "
        if self.names is None:
            names = sorted(outputs[0].metrics)
            if taken := [n for n in names if _is_reserved(n)]:
                raise PluginError(
                    f"{hook}the metric name {taken[0]!r} is the core's own. Rename it in the step"
                )
            everyone: list[list[str]] = [names] * dist.get_world_size()
            if len(everyone) > 1:
                dist.all_gather_object(everyone, names)
            for rank, others in enumerate(everyone):
                if others != everyone[0]:
                    raise PluginError(
                        f"{hook}rank 0 has the metrics {everyone[0]}, rank {rank} {others}. Their "
                        "names must not depend on the data: use a Ratio whose denominator is 0"
                    )
            self.names = names
        for output in outputs:
            if sorted(output.metrics) != self.names:
                raise PluginError(
                    f"{hook}its metrics were {self.names}, and now are {sorted(output.metrics)}. "
                    "Their names must not depend on the data: use a Ratio whose denominator is 0"
                )
        return self.names


def _is_reserved(name: str) -> bool:
    return name in RESERVED_METRICS or name.startswith(RESERVED_PREFIXES)


class MetricsFile:
    """The core's own Tracker: one line of JSON a logged step."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / METRICS

    def start(self, info: Mapping[str, Any]) -> None:
        """Drop the lines that the run will write again: it goes on from `info["logged"]`."""
        with refusing(RunError, RESTART, self.path):
            rewind(self.path, int(info["logged"]), int(info["step"]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one line, all of it or nothing."""
        line = json.dumps({"step": step, **metrics}).encode() + b"\n"
        with refusing(RunError, RESTART, self.path), self.path.open("ab", buffering=0) as file:
            append(file, line, os.fstat(file.fileno()).st_size, sync=False)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Write nothing: the file has numbers only."""

    def close(self) -> None:
        """Close nothing: every line is written whole."""


def rewind(path: Path, logged: int, step: int) -> None:
    """Drop the lines after step `logged`, a line torn by a kill, and what is no line of metrics.

    Measurements stand until `step`, where the run goes on: they are in no window of steps, and
    one that was made beside the training comes behind later lines.
    """
    if not path.exists():
        return
    lines = list(whole_lines(path))
    rows = [(line, row) for line, row in lines if row is not None]
    if odd := len(lines) - len(rows):
        number, first = next((n, line) for n, (line, row) in enumerate(lines, 1) if row is None)
        console.print(
            f"{path}: left out as no metrics: {counted(odd, 'line')}, the first in line {number}: "
            f"{line_of(first)}"
        )
    kept = [
        line + b"\n"
        for line, row in rows
        if row["step"] <= (step if is_measurement(row) else logged)
    ]
    write_file(path, b"".join(kept))


def is_measurement(row: Mapping[str, Any]) -> bool:
    """Say whether a line is a validation's or an evaluation's, not the training's own."""
    return all(name == "step" or name.startswith(MEASURED) for name in row)


@dataclass(slots=True)
class Trackers:
    """A run's trackers; one that fails is told of once, and then left alone.

    Only what the core's own raises, a RunError, ends the run.
    """

    alive: list[tuple[str, Tracker]]
    told: set[str] = field(default_factory=set)  # numbers that were not finite

    def start(self, info: Mapping[str, Any]) -> None:
        self._each("start", info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log what is finite: JSON has no other numbers.  The rest is told of once, by name."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in [name for name in metrics if name not in {*finite, *self.told}]:
            self.told.add(name)
            console.print(
                f"warning: {name} of step {step} is {metrics[name]}, which is not logged; this is "
                "said once"
            )
        if finite:
            self._each("log", step, finite)

    def event(self, name: str, **values: object) -> None:
        self._each("event", name, values)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: object) -> None:
        for entry in tuple(self.alive):
            package, tracker = entry
            try:
                getattr(tracker, method)(*copy.deepcopy(arguments))  # one may edit what it gets
            except (RunError, KeyboardInterrupt, Interrupted):
                raise  # RunError: the run's own metrics. Where they do not fit, no checkpoint will
            except BaseException as exc:  # also SystemExit: it would end the run without a word
                self.alive.remove(entry)
                console.print(
                    f"warning: the tracker of {package} failed ({type(exc).__name__}: "
                    f"{in_message(cut(said(exc), 400))}); training goes on without it"
                )
