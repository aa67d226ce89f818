"""`train.precision: fp8` on one GPU: steps of cases D1 and E1 of step.py with and without it.

python benchmarks/float8_gpu.py            an H100 or H200, under two minutes
python benchmarks/float8_gpu.py --small    the same code on a CPU, in seconds

First, the kernels against plain torch at the shapes of both cases, and what products gain.  Then
each case in bfloat16 and in float8 (E1 with the head trained, and frozen): all processes compile
beside each other and then take their turns.  The table at the end has the time of a step behind
others and of one alone, of which the host's until everything was launched, the most memory, the
loss, and how the gradients of a step lie to each other (the least cosine of a weight).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import step_case
import step_case_e1
import torch
from step_profile import profile
from torch import Tensor

from specforge_core.compiled import compile_units
from specforge_core.float8 import (
    FLOAT8,
    LARGEST,
    LEAST,
    Lines,
    both,
    by_columns,
    by_rows,
    in_words,
    multiply,
    to_float8,
)
from specforge_core.types import Batch, Draft

CASES = ("D1", "E1", "E1f")
MODES = ("bf16", "fp8")
ROW = 20  # steps behind each other
# rows and columns of what is quantised: states, gradients, weights, a chunk of logits
MATRICES = (
    *((8192, 4096), (8192, 12288), (3072, 4096), (2048, 4096), (2048, 12288), (14336, 12288)),
    *((1024, 151936), (151936, 4096), (2048, 32000), (1000, 4096), (7, 64)),
)
# rows, what is summed over, columns: D1's layers and head, its weights' gradients, then E1's
PRODUCTS = (
    *((8192, 4096, 4096), (8192, 4096, 12288), (8192, 12288, 4096)),
    *((1024, 4096, 151936), (1024, 151936, 4096), (12288, 8192, 4096)),
    *((2048, 4096, 6144), (2048, 4096, 12288), (2048, 12288, 4096)),
    *((12288, 14336, 4096), (2048, 4096, 32000), (2048, 32000, 4096)),
)


def build(case: str, small: bool) -> tuple[Draft, Any, Batch]:
    """Return a case's draft, step and batch, on a GPU unless small."""
    device, dtype = ("cpu", torch.float32) if small else ("cuda", torch.bfloat16)
    if case == "D1":
        d1 = step_case.SMALL if small else step_case.CASES["D1"]
        draft, step = step_case.build(d1, device, dtype)
        return draft, step, step_case.random_batch(d1, step, device, dtype)
    e1 = step_case_e1.SMALL if small else step_case_e1.E1
    draft, other = step_case_e1.build(e1, device, dtype, train_head=case == "E1")
    return draft, other, step_case_e1.random_batch(e1, draft, other, dtype)


def child(case: str, mode: str, small: bool, gradients: Path) -> None:
    """Compile, write a line, wait for one, measure, write a line: JSON both; kernels to stderr."""
    draft, step, batch = build(case, small)
    if mode == "fp8":
        to_float8(draft, batch["hidden_states"].device)
    if not small:
        compile_units(draft.compiled)
    wait = (lambda: None) if small else torch.cuda.synchronize

    def one_step() -> Tensor:
        draft.model.zero_grad(set_to_none=True)
        out = step(draft, batch, step_case.context())
        loss: Tensor = out.loss_sum / out.weight
        step_case.backward(loss)
        return loss.detach()

    began = time.perf_counter()
    loss = float(one_step())
    torch.save(
        {
            name: p.grad[:64].float().cpu()
            for name, p in draft.model.named_parameters()
            if p.grad is not None
        },
        gradients,
    )
    for _ in range(2):
        one_step()
    wait()
    ready = {"told": in_words(draft, step), "warm": time.perf_counter() - began, "loss": loss}
    print(json.dumps(ready), flush=True)
    sys.stdin.readline()
    draft.model.zero_grad(set_to_none=True)
    if not small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps, hosts = [], []
    for number in range(3 if small else 14):
        wait()
        began = time.perf_counter()
        one_step()
        host = time.perf_counter() - began
        wait()
        if number > 1:  # the clocks are up
            hosts.append(1e3 * host)
            steps.append(1e3 * (time.perf_counter() - began))
    began, count = time.perf_counter(), 2 if small else ROW
    for _ in range(count):
        one_step()
    wait()
    row = 1e3 * (time.perf_counter() - began) / count
    found = {"ms": median(steps), "row": row, "host": median(hosts), "gib": 0.0}
    if not small:
        found["gib"] = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout = sys.stderr  # what is printed from here on
        profile(one_step, top=12)
    print(json.dumps(found), file=sys.__stdout__, flush=True)


def plain(x: Tensor) -> Lines:
    """Return a matrix by rows as `by_rows` does, by torch's own operators."""
    sizes = x.float().abs().amax(1, keepdim=True).clamp(min=LEAST)
    values = (x.float() * (LARGEST / sizes)).clamp(-LARGEST, LARGEST)
    return Lines(values.to(FLOAT8), sizes / LARGEST)


def differ(found: Lines, wanted: Lines) -> tuple[float, float]:
    """Return which part of the numbers differs at all, and how far scales do."""
    length = wanted.values.shape[1]
    values = found.values[:, :length].view(torch.uint8) != wanted.values.view(torch.uint8)
    return float(values.float().mean()), step_case.relative(found.scales, wanted.scales)


def quantising(small: bool) -> None:
    """Compare the kernels with plain torch, and time them."""
    print("\nmatrix: by rows and by columns, which part differs from plain torch's, and scales'")
    for m, k in ((37, 96), (48, 64)) if small else MATRICES:
        x = torch.randn(m, k, device="cpu" if small else "cuda", dtype=torch.bfloat16)
        x[m // 2] = 0
        rows, columns = both(x)
        off = (*differ(rows, plain(x)), *differ(columns, plain(x.t())))
        told = f"{m:6} x {k:6}: {off[0]:.1e} {off[1]:.0e}, {off[2]:.1e} {off[3]:.0e}"
        assert not columns.values[:, m:].view(torch.uint8).any(), "what is behind the rows is not 0"
        if not small:
            together = timed(lambda x=x: both(x))
            one = timed(lambda x=x: by_rows(x))
            other = timed(lambda x=x: by_columns(x))
            moved = m * k / 1e6  # by each byte that is read or written for a number
            told += f"; both {together:.3f} ms ({6 * moved / together:.0f} GB/s), rows {one:.3f} "
            told += f"({5 * moved / one:.0f}), columns {other:.3f} ({5 * moved / other:.0f})"
        print(told, flush=True)


def multiplying(small: bool) -> None:
    """Compare products with those of what float8 keeps, and time them beside bfloat16's."""
    print("\nproduct: its error against the same numbers' in float32, and against bfloat16's")
    for m, k, n in ((37, 64, 96),) if small else PRODUCTS:
        x, weight = (
            torch.randn(rows, k, device="cpu" if small else "cuda", dtype=torch.bfloat16)
            for rows in (m, n)
        )
        a, b = (by_rows(y) for y in (x, weight))
        first = slice(0, 256)
        kept = (a.values[first].float() * a.scales[first]) @ (b.values.float() * b.scales).t()
        found, wide = multiply(a, b)[first], x[first].float() @ weight.t().float()
        off = step_case.relative(found, kept), step_case.relative(found, wide)
        told = f"{m:6} x {k:6} x {n:6}: {off[0]:.1e}, {off[1]:.1e}"
        if not small:
            del kept, wide
            narrow = timed(lambda a=a, b=b: multiply(a, b))
            before = timed(lambda x=x, weight=weight: x @ weight.t())
            work = 2 * m * k * n / 1e9
            told += f"; {narrow:.3f} ms ({work / narrow:.0f} TFLOP/s), bfloat16 {before:.3f} "
            told += f"({work / before:.0f}): {before / narrow:.2f}x"
        print(told, flush=True)


def timed(call: Any) -> float:
    """Return the milliseconds of a call on a GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25))


class Child:
    """A case in one mode, in a process of its own."""

    def __init__(self, case: str, mode: str, small: bool, folder: Path) -> None:
        self.name = f"{case} {mode}"
        self.gradients, self._errors = folder / f"{case}-{mode}.pt", folder / f"{case}-{mode}.log"
        given = [case, mode, str(self.gradients), *(["--small"] if small else [])]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--child", *given],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors},
                text=True,
                env=environment,
            )

    def read(self) -> dict[str, Any]:
        """Return its next line; it ends the benchmark if there is none."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self.name} failed:\n{self._errors.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def measure(self) -> dict[str, Any]:
        """Let it measure; return what it found, and print its kernels."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = self.read()
        self._process.communicate()
        kernels = self._errors.read_text()
        if (at := kernels.find("kernels, ")) >= 0:
            print(f"\n{self.name}: {kernels[at:]}", end="")
        return found

    def kill(self) -> None:
        """End it, wherever it is."""
        self._process.kill()
        self._process.wait()


def cosine(one: Path, other: Path) -> str:
    """Return the least cosine of a weight's gradients (their first 64 rows), and the median."""
    grads = torch.load(one), torch.load(other)
    found = {
        name: float(torch.cosine_similarity(*(g[name].flatten().double() for g in grads), dim=0))
        for name in grads[0]
    }
    least = min(found, key=lambda name: found[name])
    return f"{found[least]:.4f} ({least}), median {median(found.values()):.4f}"


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, mode, gradients = args.child
        child(case, mode, args.small, Path(gradients))
        return
    if not (args.small or torch.cuda.is_available()):
        parser.error("the cases need a GPU. Try: --small")
    print(f"{'CPU' if args.small else torch.cuda.get_device_name()}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        runs = [Child(case, mode, args.small, Path(folder)) for case in CASES for mode in MODES]
        try:
            first = [run.read() for run in runs]
            found = [run.measure() for run in runs]
        finally:
            for run in runs:
                run.kill()
        quantising(args.small)
        multiplying(args.small)
        print("\nms of a step behind others, as in training, and alone, with bf16 and with fp8")
        for at, case in zip(range(0, len(runs), 2), CASES, strict=True):
            a, b = found[at : at + 2]
            print(
                f"{case:4} {a['row']:.1f}, {b['row']:.1f}: {a['row'] / b['row']:.3f}x   "
                f"alone {a['ms']:.1f}, {b['ms']:.1f}: {a['ms'] / b['ms']:.3f}x   "
                f"host {a['host']:.1f}, {b['host']:.1f}   {a['gib']:.2f}, {b['gib']:.2f} GiB   "
                f"compiled in {first[at]['warm']:.0f}, {first[at + 1]['warm']:.0f} s   "
                f"loss {first[at]['loss']:.5f}, {first[at + 1]['loss']:.5f}   "
                f"cosine {cosine(runs[at].gradients, runs[at + 1].gradients)}"
            )
            print(f"      {first[at + 1]['told']}")


if __name__ == "__main__":
    main()
