"""Case E1 of step.py: one EAGLE-3 training step (forward and backward) against its floor.

python benchmarks/step.py --case E1            an H100, bfloat16, Qwen3-8B shapes
python benchmarks/step.py --case E1 --small    the same code on a CPU, in seconds

Nothing is downloaded: target tensors and captured states are random, all positions are
supervised.  Correctness comes first: the fused loss, the merged attention and a whole step
against float64 or eager float32.  The weights are bfloat16, as FSDP computes with them; the
optimizer is not part of it.
"""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

import torch
from specforge_eagle3.step import Eagle3Step
from step_case_e1 import E1, SMALL, Case, backward, build, check, context, random_batch
from step_profile import profile

from specforge_core.compiled import compile_units
from specforge_core.types import Batch, Draft


def flops(case: Case, train_head: bool) -> dict[str, float]:
    """Return forward + backward FLOPs of each part, of what this implementation must do."""
    wide, narrow = case.heads * case.head_dim, case.kv_heads * case.head_dim
    rows, width = case.length * case.steps, case.hidden
    head = 2 * width * case.draft_vocab
    return {
        "fc": 2 * 2 * case.length * 3 * width * width,  # captured states want no gradient
        # once per token; as parts of q, k and v at every step it would be `steps` times that
        "embeddings' half of q, k, v": 3 * 2 * case.length * width * (wide + 2 * narrow),
        "layer: matrix products": 3 * 2 * rows * width * (2 * wide + 2 * narrow + 3 * case.mlp),
        "layer: attention": 3.5 * 4 * case.steps * case.length**2 / 2 * wide,
        "head": (3 if train_head else 2) * head * rows,
        "teacher": head * case.length,
    }


def one_step(draft: Draft, step: Eagle3Step, batch: Batch) -> tuple[float, float]:
    """Return the milliseconds of forward and of both."""
    draft.model.zero_grad(set_to_none=True)
    times = [now()]
    out = step(draft, batch, context())
    loss = out.loss_sum / out.weight
    times.append(now())
    backward(loss)
    times.append(now())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return times[0].elapsed_time(times[1]), times[0].elapsed_time(times[2])
    return 1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[0])


def now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def measure(
    case: Case, device: str, dtype: torch.dtype, repeat: int, rate: float, head: bool
) -> None:
    gc.collect()  # what was measured before, and compiled, is not held
    torch.compiler.reset()
    draft, step = build(case, device, dtype, train_head=head)
    batch = random_batch(case, draft, step, dtype)
    if device == "cuda":
        compile_units(draft.compiled)
    began = time.perf_counter()
    for _ in range(3):
        one_step(draft, step, batch)
    print(f"\nhead {'trained' if head else 'frozen'}; warm-up {time.perf_counter() - began:.0f} s")
    if device == "cuda":
        draft.model.zero_grad(set_to_none=True)
        held = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    found = [one_step(draft, step, batch) for _ in range(repeat)]
    totals = [both for _, both in found]
    work = flops(case, head)
    floor = 1e3 * sum(work.values()) / rate
    print(f"step (forward + backward), median of {repeat}: {median(totals):.1f} ms")
    print(f"  spread {min(totals):.1f} to {max(totals):.1f} ms; ", end="")
    print(f"forward {median(forward for forward, _ in found):.1f} ms")
    print(f"floor: {sum(work.values()) / 1e12:.1f} TFLOP at the measured rate: {floor:.1f} ms")
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak memory: {peak:.1f} GiB, of which held between steps {held:.1f} GiB")
    if case.best_known:
        known = case.best_known[0 if head else 1]
        print(f"best known trainer: {known[0]} ms, {known[1]} GiB; floor stated {case.floor_ms} ms")
    for name, value in work.items():
        print(f"  {name:28} {value / 1e12:6.2f} TFLOP {1e3 * value / rate:6.1f} ms")
    if device == "cuda" and head:
        profile(lambda: one_step(draft, step, batch))


def matmul_rate(case: Case, device: str, dtype: torch.dtype, repeat: int) -> float:
    """Return FLOP/s of a product as in the draft's MLP, on random data."""
    a = torch.randn(case.length * case.steps, case.hidden, device=device).to(dtype)
    b = torch.randn(case.hidden, case.mlp, device=device).to(dtype)
    times = []
    for _ in range(3 + repeat):
        start = now()
        for _ in range(5):
            a @ b
        end = now()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(start.elapsed_time(end) if device == "cuda" else 1e3 * (end - start))
    return float(2 * a.numel() * case.mlp * 5 / (median(times[3:]) / 1e3))


def run(small: bool, repeat: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = SMALL if small else E1
    print(f"case: {'small' if small else 'E1'} {case}")
    check(device, dtype)
    rate = matmul_rate(case, device, dtype, repeat)
    print(f"matrix products of the draft's MLP, {dtype}: {rate / 1e12:.3g} TFLOP/s")
    for train_head in (True, False):
        measure(case, device, dtype, repeat, rate, train_head)
