"""What a process's devices do in some steps: a trace to look at, and the shares of its time."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..files import replacing
from ..progress import console

BEFORE = 10  # steps that go before: what is compiled and captured first is no steady run's


class Span(NamedTuple):
    """A time in which a device ran one kernel."""

    start: float
    end: float
    name: str


class Shares(NamedTuple):
    """Of the time from the first kernel's start to the last one's end; 1 in all."""

    computing: float
    others: float  # ran NCCL's kernels alone, which send, or wait for what other ranks send
    nothing: float


class Trace:
    """Traces `steps` steps behind this process's first ten."""

    def __init__(self, steps: int | None, output_dir: Path, device: torch.device) -> None:
        self._steps, self._folder = steps, output_dir
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._first, self._now = 0, 0  # the first step traced, and the last one launched

    def step(self, number: int) -> None:
        """Tell of a step that is launched, which has this number."""
        if self._steps is None:
            return
        self._now = number
        if self._profiler is None:
            self._first = number + BEFORE
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints lines of its own else
            plan = schedule(wait=BEFORE - 2, warmup=1, active=self._steps, repeat=1)
            self._profiler = profile(
                activities=self._activities,
                schedule=plan,
                on_trace_ready=self._write,
                acc_events=True,  # without, some torches warn that only one cycle's are kept
            )
            self._profiler.start()
        else:
            self._profiler.step()

    def close(self) -> None:
        """End a trace that the run has not come to the end of."""
        if self._profiler is not None:
            self._profiler.stop()
            if self._now < self._first:
                console.print(
                    f"note: nothing is traced: the run ended before step {self._first}. "
                    f"Try: train.max_steps={self._first + (self._steps or 0)}"
                )

    def _write(self, found: profile) -> None:
        if self._now < self._first:  # it is ended while it warms up
            return
        path = self._folder / f"trace-{self._first}.json.gz"
        with TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            found.export_chrome_trace(str(plain))
            with plain.open("rb") as source, replacing(path) as file, gzip.open(file, "wb") as out:
                shutil.copyfileobj(source, out)
        events: Iterable[Any] = found.events() or ()  # type: ignore[no-untyped-call]
        told = shares(
            Span(e.time_range.start, e.time_range.end, e.name)
            for e in events
            if e.device_type.name == "CUDA" and not e.is_user_annotation
        )
        console.print(
            f"{path} has a trace of steps {self._first} to {self._now}"
            + (
                f": the GPU computed {told.computing:.1%} of the time, only sent or waited for "
                f"other ranks {told.others:.1%}, and had nothing to do {told.nothing:.1%}"
                if told
                else ""
            )
            + ". To look at it: https://ui.perfetto.dev"
        )


def shares(spans: Iterable[Span]) -> Shares | None:
    """Return what a device did with its time, whatever ran beside what; None of no kernels."""
    kernels = [*spans]
    if not kernels:
        return None
    whole = max(span.end for span in kernels) - min(span.start for span in kernels)
    computing = _covered(span for span in kernels if not span.name.startswith("nccl"))
    busy = _covered(kernels)
    return Shares(computing / whole, (busy - computing) / whole, 1 - busy / whole)


def _covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    covered, end = 0.0, float("-inf")
    for span in sorted(spans):
        covered += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return covered
