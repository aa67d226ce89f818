"""How a run computes on this machine: what every `auto` became."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RunConfig
from ..cpu import pick_dtype, pick_target_dtype, use_threads
from ..devices import pick_device
from ..target.info import load_target_info


@dataclass(frozen=True, slots=True)
class Machine:
    """Recorded in every checkpoint."""

    device: str  # "cpu" or "cuda"
    compute_dtype: str
    target_dtype: str | None  # None offline: no target runs
    threads: int  # of one CPU operation

    def __str__(self) -> str:
        target = f", target in {self.target_dtype}" if self.target_dtype else ""
        return f"{self.device}: draft in {self.compute_dtype}{target}, {self.threads} thread(s)"


def choose(run: RunConfig) -> Machine:
    """Return how this run computes; sets the number of threads that it says."""
    device = pick_device(run.train.device, "train.device")
    online = run.data.capture_dir is None
    return Machine(
        device=device.type,
        compute_dtype=str(pick_dtype(run.train.compute_dtype, device)).removeprefix("torch."),
        target_dtype=_target_dtype(run) if online else None,
        threads=use_threads(run.train.threads, beside=online and device.type == "cpu"),
    )


def _target_dtype(run: RunConfig) -> str:
    own = load_target_info(run.target).config.get("dtype")
    dtype = pick_target_dtype(
        run.target.dtype, own, pick_device(run.target.device, "target.device")
    )
    return str(own) if dtype == "auto" else dtype
