"""Time one training step (forward and backward) of a draft against its floor by arithmetic.

python benchmarks/step.py --case D1            an H100, bfloat16, Qwen3-8B shapes: DFlash
python benchmarks/step.py --case D1 --small    the same code on a CPU, in seconds
python benchmarks/step.py --case E1            EAGLE-3, see step_e1.py

Nothing is downloaded: target tensors and features are random.  Correctness comes first:
the fused loss against float64, and the attention kernels' gradients against the eager path's.
The weights are bfloat16, as FSDP computes with them; the optimizer is not part of it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import step_e1
import torch
from specforge_dflash.anchored import AnchoredMask
from specforge_dflash.attention import attend
from specforge_dflash.step import DFlashStep
from step_case import CASES, SMALL, Case, backward, build, check, context, random_batch
from torch import Tensor

from specforge_core.compiled import compile_units
from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.types import Batch, Draft


class Clock:
    """Named marks: device events on a GPU, the host's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        if not self.on_gpu:
            self.marks[name] = time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.marks[name] = event

    def between(self, start: str, end: str) -> float:
        """Milliseconds."""
        if not self.on_gpu:
            return float(1e3 * (self.marks[end] - self.marks[start]))
        torch.cuda.synchronize()
        return float(self.marks[start].elapsed_time(self.marks[end]))


def timed(call: Callable[[], object], device: str, repeat: int, warm_up: int = 3) -> float:
    """Return the median milliseconds of one call."""
    times = []
    for i in range(warm_up + repeat):
        clock = Clock(device)
        clock.mark("start")
        call()
        clock.mark("end")
        if i >= warm_up:
            times.append(clock.between("start", "end"))
    return median(times)


def matmul_rate(case: Case, device: str, dtype: torch.dtype, repeat: int) -> float:
    """Return FLOP/s of a product as in the draft's MLP, on random data."""
    a = torch.randn(case.slots, case.hidden, device=device).to(dtype)
    b = torch.randn(case.hidden, case.mlp, device=device).to(dtype)
    calls = 10

    def run() -> None:
        for _ in range(calls):
            a @ b

    flops = 2 * case.slots * case.hidden * case.mlp * calls
    return flops / (timed(run, device, repeat) / 1e3)


def flops(case: Case, visible: float, rows: int) -> dict[str, float]:
    """Return forward + backward FLOPs of each part; `visible` counts (slot, key) pairs."""
    wide, narrow = case.heads * case.head_dim, case.kv_heads * case.head_dim
    weights = case.hidden * (2 * wide + 2 * narrow + 3 * case.mlp)
    fc = 2 * case.length * case.layers * case.hidden**2
    keys = 2 * case.length * case.hidden * 2 * narrow * case.layers
    scores = 4 * visible * wide * case.layers
    return {
        # features want no gradient; the head's weights neither
        "context (fc, norm)": 2.0 * fc,
        "layers: matrix products": 3.0 * (2 * case.slots * weights * case.layers + keys),
        "layers: attention": 3.5 * scores,  # the backward makes the scores again
        "head + loss": 2.0 * 2 * rows * case.hidden * case.vocab,
    }


def instrument(draft: Draft, clock: Clock) -> None:
    """Mark where the parts of a step begin and end, by hooks on the model alone."""
    model: Any = draft.model

    def after(name: str, name_backward: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
            clock.mark(name)
            out.register_hook(lambda _grad: clock.mark(name_backward))  # type: ignore[no-untyped-call]

        return hook

    model.register_forward_pre_hook(lambda *_: clock.mark("model"))
    model.hidden_norm.register_forward_hook(after("layers", "b_context"))
    model.norm.register_forward_hook(after("head", "b_layers"))


def one_step(draft: Draft, step: DFlashStep, batch: Batch, clock: Clock) -> None:
    draft.model.zero_grad(set_to_none=True)
    clock.mark("start")
    out = step(draft, batch, context())
    loss = out.loss_sum / out.weight
    clock.mark("backward")
    backward(loss)
    clock.mark("end")


PARTS = {
    "embedding": [("start", "model")],
    "context (fc, norm)": [("model", "layers"), ("b_context", "end")],
    "layers": [("layers", "head"), ("b_layers", "b_context")],
    "head + loss": [("head", "backward"), ("backward", "b_layers")],
}


def measure(
    case: Case, device: str, dtype: torch.dtype, repeat: int, rate: float, documents: int
) -> None:
    draft, step = build(case, device, dtype)
    batch = random_batch(case, step, device, dtype, documents=documents)
    clock = Clock(device)
    instrument(draft, clock)
    if device == "cuda":
        compile_units(draft.compiled)
    began = time.perf_counter()
    for _ in range(3):
        one_step(draft, step, batch, clock)
    clock.between("start", "end")
    print(f"warm-up with compilation: {time.perf_counter() - began:.0f} s")
    if device == "cuda":
        draft.model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**30
    totals, forwards = [], []
    parts: dict[str, list[list[float]]] = {name: [] for name in PARTS}
    for _ in range(repeat):
        one_step(draft, step, batch, clock)
        totals.append(clock.between("start", "end"))
        forwards.append(clock.between("start", "backward"))
        for name, spans in PARTS.items():
            parts[name].append([clock.between(*span) for span in spans])

    rows = case.anchors * (case.block - 1)
    work = flops(case, case.slots * (case.length / documents / 2 + case.block), rows)
    floor = 1e3 * sum(work.values()) / rate
    total = median(totals)
    print(f"\nstep (forward + backward), median of {repeat}: {total:.1f} ms")
    print(f"  spread {min(totals):.1f} to {max(totals):.1f} ms; forward {median(forwards):.1f} ms")
    print(f"floor: {sum(work.values()) / 1e12:.1f} TFLOP at the measured rate: {floor:.1f} ms")
    if case.floor_ms:
        print(f"floor stated: {case.floor_ms:.0f} ms; best known trainer: {case.best_known_ms} ms")
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak memory: {peak:.1f} GiB, of which held between steps {held:.1f} GiB")
        if case.best_known_gib:
            print(f"best known trainer: {case.best_known_gib} GiB")
    layer_work = work.pop("layers: matrix products") + work.pop("layers: attention")
    work = {"embedding": 0.0, **work, "layers": layer_work}
    print(f"\n{'part':22} {'forward':>9} {'backward':>9} {'sum':>9} {'floor':>9}   ms")
    for name, times in parts.items():
        sums = [median(column) for column in zip(*times, strict=True)]
        forward, backward = sums[0], sum(sums[1:])
        bound = 1e3 * work[name] / rate
        print(f"{name:22} {forward:9.1f} {backward:9.1f} {forward + backward:9.1f} {bound:9.1f}")


def measure_attention(case: Case, device: str, dtype: torch.dtype, repeat: int) -> None:
    """Time attention alone, by the kernels that the layers take."""
    gen = torch.Generator().manual_seed(3)
    limits = torch.randperm(case.length - 1, generator=gen)[: case.anchors].sort().values
    limits = limits[None].to(device)
    shapes = [(case.heads, case.slots), *[(case.kv_heads, case.length)] * 2]
    shapes += [(case.kv_heads, case.slots)] * 2
    q, kc, vc, kb, vb = (
        torch.randn(1, h, n, case.head_dim, device=device).to(dtype).requires_grad_()
        for h, n in shapes
    )
    starts = torch.zeros_like(limits)
    mask = AnchoredMask.build(limits, starts, case.length, case.block, None)
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        return attend(q, (kc, vc), (kb, vb), mask)

    with torch.no_grad():
        front = timed(forward, device, repeat)
    both = timed(lambda: backward(forward(), grad), device, repeat)
    make = timed(
        lambda: AnchoredMask.build(limits, starts, case.length, case.block, None), device, repeat
    )
    n = case.layers
    print(f"\nattention alone, {n} layers: {n * front:.1f} ms, with backward {n * both:.1f} ms")
    print(f"its mask, once a step: {make:.2f} ms")


def measure_head(case: Case, device: str, dtype: torch.dtype, repeat: int) -> None:
    """Time head and loss alone for some numbers of rows at a time."""
    rows = case.anchors * (case.block - 1)
    gen = torch.Generator(device).manual_seed(4)
    weight = torch.randn(case.vocab, case.hidden, device=device, generator=gen).mul(0.02).to(dtype)
    hidden = torch.randn(rows, case.hidden, device=device, generator=gen).to(dtype)
    labels = torch.randint(case.vocab, (rows,), device=device, generator=gen)
    hidden.requires_grad_()
    for chunk in (512, 1024, 1536, 2048, 3840):

        def run(chunk: int = chunk) -> None:
            losses, _ = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
            backward(losses.sum())

        print(f"head + loss alone, {chunk} rows at a time: {timed(run, device, repeat):.1f} ms")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--case", choices=[*sorted(CASES), "E1"], default="D1")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the code")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--documents", type=int, default=1, help="of D1's row")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu" and not args.small:
        parser.error(f"case {args.case} needs a GPU. Try: --small")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"machine: {name}; torch {torch.__version__}, Python {platform.python_version()}")
    if args.case == "E1":
        step_e1.run(args.small, args.repeat)
        return
    case = SMALL if args.small else CASES[args.case]
    print(f"case: {'small' if args.small else args.case} {case}")
    check(device, dtype)
    rate = matmul_rate(case, device, dtype, args.repeat)
    print(f"matrix products of the draft's MLP, {dtype}: {rate / 1e12:.3g} TFLOP/s")
    measure(case, device, dtype, args.repeat, rate, args.documents)
    measure_head(case, device, dtype, args.repeat)
    if device == "cuda":
        measure_attention(case, device, dtype, args.repeat)


if __name__ == "__main__":
    main()
