"""What a capture will take: bytes of the disk, time, memory; measured on a few prompts."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..config import RunConfig
from ..data.order import epoch_order
from ..strategy import Strategy
from ..text import in_time, in_units
from ..types import CaptureSpec, Prompt
from .job import Job, capture_directory
from .layout import is_ragged
from .samples import capture_in_order, check_first, to_host

PROBE = 3  # windows of prompts that are captured, after a first sample that is not counted
ROW_BYTES = 24  # of a shard's row table, for each sample


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of stored samples, as the spec promises them."""

    per_token: int
    per_sample: int

    @classmethod
    def of(cls, spec: CaptureSpec) -> Size:
        """Return what the fields of a spec take."""
        token, sample = 0, ROW_BYTES
        for field in spec.fields.values():
            item = getattr(torch, field.dtype).itemsize
            if is_ragged(field):
                token += item * prod(n or 0 for n in field.shape[1:])
            else:
                sample += item * prod(n or 0 for n in field.shape)
        return cls(token, sample)

    def total(self, samples: int, tokens: int) -> int:
        """Return the bytes of some samples that have `tokens` together."""
        return self.per_token * tokens + self.per_sample * samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What `specforge capture` would do, were it started now into an empty directory."""

    directory: str
    samples: int
    tokens: int
    bytes_per_token: int
    total: str
    free: str
    tokens_per_second: float
    time: str  # without waiting for the disk
    memory: dict[str, str]


def estimate(run: RunConfig, strategy: Strategy) -> Estimate:
    """Capture `PROBE` windows of a run's prompts and say what all will take; writes nothing.

    Raises what `run_capture` does for a run that cannot be captured.
    """
    directory = capture_directory(run)
    job = Job.open(run, strategy)
    prompts = job.prompts()
    size = Size.of(job.adapter.spec)
    order = epoch_order(len(prompts), run.train.seed, 0)[: PROBE * run.capture.window]
    engine = job.engine()
    try:
        chosen: list[Prompt] = [prompts[i] for i in order]
        check_first(strategy, run.strategy, engine, job.adapter, iter(chosen))
        started = time.perf_counter()
        for index, sample in capture_in_order(
            strategy, engine, job.adapter, chosen, run.capture.window
        ):
            if sample is not None:
                to_host(index, sample)
        seconds = time.perf_counter() - started
        memory = peak_memory()
    finally:
        engine.close()
    rate = sum(len(prompt.input_ids) for prompt in chosen) / max(seconds, 1e-9)
    return Estimate(
        directory=str(directory),
        samples=len(prompts),
        tokens=prompts.num_tokens,
        bytes_per_token=size.per_token,
        total=in_units(size.total(len(prompts), prompts.num_tokens)),
        free=in_units(free_bytes(directory)),
        tokens_per_second=round(rate, 1),
        time=in_time(prompts.num_tokens / rate),
        memory=memory,
    )


def free_bytes(place: Path) -> int:
    """Return the room where a folder is or will be.  Raises OSError."""
    folder = place.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def peak_memory() -> dict[str, str]:
    """Return the most memory that this process has had, of the host and of each GPU it used."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": in_units(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if used := torch.cuda.max_memory_allocated(number):
                found[f"cuda:{number}"] = in_units(used)
    return found
