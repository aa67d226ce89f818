"""Sums over ranks and steps, divided once; and where they are written."""

from __future__ import annotations

import copy
import json
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
from ..evaluate.curves import whole_lines
from ..files import append, refusing, write_file
from ..progress import console
from ..records import in_message
from ..stop import Interrupted
from ..text import cut, said
from ..types import RESERVED_METRICS, Ratio, StepOutput, Tracker

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
        self, package: str, names: tuple[str, ...], kinds: tuple[bool, ...], total: Tensor
    ) -> None:
        self._package, self._names, self._kinds = package, names, kinds
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
        """Return the sums, and each of `extra`.  Waits until the device has come so far."""
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
        rest = values[2 * len(self._names) :]
        found = iter(rest), iter(rest[self._kinds.count(False) :])  # numbers come before tensors
        return sums, [next(found[kind]) for kind in self._kinds]


def check_scalars(who: str, output: StepOutput, *, training: bool = True) -> None:
    """Raise PluginError for a StepOutput whose parts are no scalars, or that trains nothing."""
    if not isinstance(output.metrics, Mapping) or not all(map(_is_name, output.metrics)):
        raise PluginError(
            f"{who}: returned the metrics {output.metrics!r:.80}, expected a Ratio by name"
        )
    parts: dict[str, object] = {"loss_sum": output.loss_sum, "weight": output.weight}
    for name, ratio in output.metrics.items():
        if not isinstance(ratio, Ratio):
            raise PluginError(
                f"{who}: returned the metric {name!r} as {type(ratio).__name__}, expected a Ratio, "
                "whose num and den are summed over the ranks"
            )
        parts[f"{name}.num"], parts[f"{name}.den"] = ratio.num, ratio.den
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.ndim:
            is_ = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise PluginError(f"{who}: returned a {name} {is_}, expected a tensor without axes")
        if value.is_complex():
            raise PluginError(f"{who}: returned a {name} of complex numbers, expected a real one")
        if value.device.type == "meta":
            raise PluginError(f"{who}: returned a {name} on the meta device, expected a number")
    if training and not output.loss_sum.requires_grad:
        raise PluginError(f"{who}: returned a loss_sum without a gradient. Is it detached?")


@dataclass(slots=True)
class Reducer:
    """Sums what the ranks' micro-batches came to, in one all_reduce a step.

    Raises PluginError, naming the package, for metrics that the core or another rank cannot add.
    """

    package: str
    device: torch.device
    names: list[str] | None = None  # of the first step, the same on every rank

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
        return Reduced(self.package, ("loss", *names), kinds, total)

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


def _is_name(name: object) -> bool:
    return type(name) is str and name.isprintable() and bool(name.strip())


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
        first = next(line for line, row in lines if row is None)
        console.print(
            f"{path}: {odd} lines are no metrics, {first[:60]!r} the first: they are left out"
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

    def start(self, info: Mapping[str, Any]) -> None:
        self._each("start", info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each("log", step, metrics)

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
