"""What this machine's CPU is good at: its cores, and the dtype it multiplies fastest."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

FEW = 4
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")  # in oneDNN's names
GAIN = 1.2  # bfloat16 rounds, so it has to be worth it
_agreed: bool | None = None  # among ranks, whether bfloat16 is fast
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `wanted`; "auto" is bfloat16 where that is fast, else float32."""
    if wanted != "auto":
        return DTYPES[wanted]
    fast = device.type != "cpu" or has_fast_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def pick_target_dtype(wanted: str, own: object, device: torch.device) -> str:
    """Return the dtype to load a target with whose checkpoint says that it is of dtype `own`.

    On a CPU "auto" is bfloat16 for a bfloat16 checkpoint where that is fast, else float32; on
    another device it stays "auto", by which transformers takes the checkpoint's own.
    """
    if wanted != "auto" or device.type != "cpu":
        return wanted
    brain = str(own).removeprefix("torch.") == "bfloat16"
    return "bfloat16" if brain and has_fast_bfloat16() else "float32"


@functools.cache
def has_fast_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices faster than float32 ones.

    It must have instructions for it that no environment variable forbids, and then win a race
    of some milliseconds: emulated, bfloat16 takes up to 25 times as long as float32.
    """
    if _agreed is not None:
        return _agreed
    if not has_bfloat16_instructions(CPUINFO) or forbids_bfloat16():
        return False
    return _seconds(torch.bfloat16) * GAIN < _seconds(torch.float32)


def agree_on_bfloat16(from_first: Callable[[bool], bool]) -> None:
    """Have this rank say what the first one has measured, which `from_first` tells all.

    They share the machine while they measure, so that each may come to another end.
    """
    global _agreed
    _agreed = from_first(has_fast_bfloat16())
    has_fast_bfloat16.cache_clear()


def has_bfloat16_instructions(cpuinfo: Path) -> bool:
    """Say whether the kernel lists instructions that multiply bfloat16."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return False
    names = ("flags", "Features")
    found = (line.partition(":")[2] for line in lines if line.startswith(names))
    return any(BFLOAT16_FLAGS & set(flags.split()) for flags in found)


def forbids_bfloat16() -> bool:
    """Say whether the environment caps the instructions of oneDNN or torch below bfloat16's."""
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not any(name in isa.upper() for name in BFLOAT16_ISAS):
        return True
    return os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2")


def _seconds(dtype: torch.dtype) -> float:
    """Return the time of one matrix product of a small model's size, the best of some."""
    a, b = (torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one makes oneDNN build its kernel


def available_cores(topology: Path = TOPOLOGY, quota: Path = QUOTA) -> int:
    """Return the physical cores that this process may use, by its affinity and its cgroup."""
    cores = {_core(topology / f"cpu{number}" / "topology", number) for number in _affinity()}
    try:
        limit, period = quota.read_text(encoding="utf-8").split()
        most = len(cores) if limit == "max" else int(limit) // int(period)
    except (OSError, ValueError):
        most = len(cores)
    return max(1, min(len(cores), most))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core(topology: Path, number: int) -> tuple[str, str]:
    """Return what two hardware threads of one core have in common."""
    try:
        names = ("physical_package_id", "core_id")
        package, core = ((topology / name).read_text(encoding="utf-8").strip() for name in names)
    except OSError:
        return "", str(number)
    return package, core


def use_threads(asked: int | None = None, *, beside: bool = False) -> int:
    """Set how many CPU threads one operation of torch uses, and return it.

    `asked` (train.threads) wins, then OMP_NUM_THREADS.  Else an operation uses every physical core,
    which the ranks of a machine share, or half of them if the target runs `beside` the training:
    each of the two has a pool of its own, and MKL knows only one number for both.  With a GPU it
    uses at most 4: what is left for the CPU are copies of a few megabytes, which a thread on every
    core makes slower (on 16 cores, 8 GB/s with 16 threads and 44 GB/s with 4).
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_threads(beside))
    return torch.get_num_threads()


def _threads(beside: bool) -> int:
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        return min(FEW, cores)
    return max(1, cores // 2) if beside else cores
