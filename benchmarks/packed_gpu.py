"""What a target's capture does besides products, alone: packed attention, and the head's summary.

python benchmarks/packed_gpu.py            an H100 or H200, under a minute

Each way to run the kernel is compared with float64 first; then it is timed on rows of sequences,
beside torch's kernels for several lengths (flash) and for one (SDPA).  TFLOP/s count the causal
half of both products.  Then a head of Qwen3-8B's shape, by rows at a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_core.target import head as head_module, triton_head, triton_varlen as kernel
from specforge_core.target.head import Head
from specforge_core.target.triton_varlen import Tuning
from specforge_core.target.varlen import _one, tiles

DRAW = random.Random(0)
ROWS = {
    "8 of 2048": [2048] * 8,
    "16 of 100-2000": [DRAW.randint(100, 2000) for _ in range(16)],
    "80 of 100-300": [DRAW.randint(100, 300) for _ in range(80)],
    "2 of 8192": [8192] * 2,
}
# query heads, key/value heads, width, width of values
NAMED = "128 wide, 32/8 heads"
SHAPES = {
    NAMED: (32, 8, 128, 128),
    "64 wide, 16/2 heads": (16, 2, 64, 64),
    "256 wide, 16/8 heads": (16, 8, 256, 256),
    "192 and 128 wide, 16/16 heads": (16, 16, 192, 128),
}
# by width, the one in use among them
TRIED = {
    64: (Tuning(128, 64, 8, 3), Tuning(128, 64, 8, 2), Tuning(64, 64, 4, 2)),
    128: (
        Tuning(128, 32, 8, 3, registers=128),
        Tuning(128, 32, 8, 3, heads=2, registers=128),
        Tuning(128, 64, 8, 3),
        Tuning(64, 64, 4, 2),
    ),
    192: (Tuning(128, 64, 8, 2), Tuning(128, 32, 8, 3)),
    256: (Tuning(128, 64, 8, 2), Tuning(128, 32, 8, 3)),
}
ENOUGH = 5e-3  # of relative error: bfloat16 has 8 bits


def milliseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the median of the device's time for a call."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks))


def draw(tokens: int, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((shape[0], shape[2]), (shape[1], shape[2]), (shape[1], shape[3]))
    q, k, v = (torch.randn(tokens, *size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    return q, k, v


def ours(
    tuning: Tuning,
    rows: tuple[Tensor, Tensor, Tensor],
    lengths: list[int],
    sinks: Tensor | None = None,
    window: int = 0,
) -> Callable[[], Tensor]:
    tokens = kernel.tokens_of_a_tile(tuning, *rows[:2])
    table = tiles(lengths, tokens).cuda()
    scale = rows[0].shape[-1] ** -0.5
    return lambda: kernel.attend(*rows, sinks, scale, window, table, tuning)


def flash(rows: tuple[Tensor, Tensor, Tensor], lengths: list[int]) -> Callable[[], Any]:
    q, k, v = rows
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    ends = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    most = max(lengths)
    run = torch.ops.aten._flash_attention_forward
    return lambda: run(q, k, v, ends, ends, most, most, 0.0, True, False, scale=q.shape[-1] ** -0.5)


def sdpa(rows: tuple[Tensor, Tensor, Tensor], length: int) -> Callable[[], Tensor]:
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in rows)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def error(tuning: Tuning, shape: tuple[int, int, int, int]) -> float:
    """Return the largest relative error; NaN where what lies behind a sequence reaches it."""
    lengths, worst = [3, 700, 1, 129, 64, 333, 200], 0.0
    rows = draw(sum(lengths), shape)
    scale = shape[2] ** -0.5
    asked: list[tuple[int, Tensor | None]] = [(0, None)]
    if shape == SHAPES[NAMED]:  # each is compiled
        asked.append((100, torch.randn(shape[0], device="cuda")))
    for window, sinks in asked:
        found = ours(tuning, rows, lengths, sinks, window)()
        wide = [
            _one(*x, None if sinks is None else sinks.double(), scale, window)
            for x in zip(*(x.double().split(lengths) for x in rows), strict=True)
        ]
        given = torch.cat(wide)
        worst = max(worst, float((found - given).norm() / given.norm()))
    clean = ours(tuning, rows, lengths)()
    rows[1][703:], rows[2][703:] = torch.nan, torch.nan
    if not torch.equal(ours(tuning, rows, lengths)()[:703], clean[:703]):
        return torch.nan
    return worst


def attention() -> None:
    for name, shape in SHAPES.items():
        print(f"\n{name}, TFLOP/s: {', '.join(ROWS)}", flush=True)
        print_rates("torch's flash", flash, shape)
        print_rates(
            "SDPA, where of one length",
            lambda rows, lengths: sdpa(rows, lengths[0]) if len(set(lengths)) == 1 else None,
            shape,
        )
        for tuning in TRIED[shape[2]]:
            began, way = time.perf_counter(), in_words(tuning)
            try:
                wrong = error(tuning, shape)
                if not wrong < ENOUGH:
                    print(f"{way:48} WRONG by {wrong:.1e}", flush=True)
                    continue
                said = f"error {wrong:.1e}, {time.perf_counter() - began:.1f} s to compile"
                print_rates(way, lambda r, n, t=tuning: ours(t, r, n), shape, said)
            except Exception as exc:
                print(f"{way:48} {type(exc).__name__}: {str(exc)[:150]}", flush=True)


def in_words(tuning: Tuning) -> str:
    most = "" if tuning.registers is None else f", {tuning.registers} registers"
    held = f"{tuning.rows}x{tuning.keys}, {tuning.heads} heads, {tuning.warps} warps"
    return f"{held}, {tuning.stages} stages{most}"


def print_rates(
    way: str,
    make: Callable[[Any, list[int]], Callable[[], object] | None],
    shape: tuple[int, int, int, int],
    said: str = "",
) -> None:
    found = []
    for lengths in ROWS.values():
        call = make(draw(sum(lengths), shape), lengths)
        if call is None:
            found.append("      ")
            continue
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        work = 2 * pairs * shape[0] * (shape[2] + shape[3])
        found.append(f"{work / milliseconds(call) / 1e9:6.0f}")
    print(f"{way:48}{' '.join(found)}  {said}", flush=True)


def summaries() -> None:
    vocab, hidden, tokens = 151_936, 4096, 8192
    head = Head(weight=torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) / 64)
    states = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    logits = F.linear(states[:512], head.weight)
    bytes_read = logits.numel() * logits.element_size()
    print(f"\nsummary of 512 x {vocab} logits", flush=True)
    in_use = triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES
    for block, warps, stages in (
        (4096, 8, 3),
        (4096, 16, 2),
        (8192, 8, 3),
        (8192, 16, 3),
        (8192, 8, 1),
    ):
        triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES = block, warps, stages
        token, total = triton_head.summarize_logits(logits)
        right = bool((logits.argmax(-1) == token).all())
        apart = float((total - logits.double().logsumexp(-1)).abs().max())
        took = milliseconds(partial(triton_head.summarize_logits, logits))
        print(
            f"{block} columns, {warps} warps, {stages} stages: {took:.4f} ms, "
            f"{bytes_read / took / 1e9:.2f} TB/s, {'right' if right else 'WRONG'}, "
            f"{apart:.1e} apart",
            flush=True,
        )
    triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES = in_use
    print(f"head of {tokens} tokens: rows at once, ms of the product alone, ms with the summary")
    for rows in (512, 1024, 2048, 4096):
        head_module.GPU_ROWS = rows
        alone = milliseconds(partial(products, states.split(rows), head.weight), 5)
        whole = milliseconds(partial(head.summarize, states), 5)
        print(f"{rows:6} {alone:8.2f} {whole:8.2f}  {alone / whole:.1%}", flush=True)


def products(parts: tuple[Tensor, ...], weight: Tensor) -> None:
    for part in parts:
        F.linear(part, weight)


@torch.no_grad()
def main() -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    summaries()
    attention()
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
