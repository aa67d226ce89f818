"""Tokens per second of a step over mixed lengths, packed and padded, at the same loss per token.

python benchmarks/packing.py            a GPU, bfloat16, Qwen3-8B shapes
python benchmarks/packing.py --small    a CPU, tiny shapes, by processor time

Conversations of 100 to 2,000 tokens, most of them short, are cut into micro-batches of so many
tokens as `train.batch_tokens` cuts them.  Padded, each is as long as the longest of its batch:
`batches: padded` of DFlash, and for EAGLE-3, which only packs, by tokens that nothing supervises.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import step_case
import step_case_e1
import torch
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from specforge_eagle3 import specforge_collate

from specforge_core.batches.loader import to_device
from specforge_core.batches.turns import Share, windows
from specforge_core.compiled import compile_units
from specforge_core.types import Batch, Draft, Sample

MICROS = 6  # micro-batches that are measured, after one that is not


def lengths(shortest: int, longest: int) -> list[int]:
    drawn = torch.rand(400, generator=torch.Generator().manual_seed(0))
    return (shortest * (longest / shortest) ** drawn).long().tolist()


def cuts(sizes: list[int], tokens: int) -> list[list[int]]:
    """Return the samples of each micro-batch of one rank."""
    share = Share(0, 1, 0, tokens=tokens)
    groups = windows(share, 0, 1, lambda at: (at // len(sizes), sizes[at]), lambda: len(sizes))
    return [[turn.place for turn in turns] for turns, _ in islice(groups, 1 + MICROS)]


def seconds(draft: Draft, step: Any, batches: Sequence[Batch], on_gpu: bool) -> tuple[float, float]:
    """Return the seconds of all but the first batch, and their loss per weight."""
    clock = time.perf_counter if on_gpu else time.process_time
    spent, loss, weight = 0.0, 0.0, 0.0
    for rounds in range(2):  # the first compiles
        for number, batch in enumerate(batches):
            draft.model.zero_grad(set_to_none=True)
            started = clock()
            out = step(draft, batch, step_case.context())
            torch.autograd.backward(out.loss_sum)
            total = float(out.loss_sum.detach())  # waits for the device
            if on_gpu:
                torch.cuda.synchronize()
            if rounds and number:
                spent += clock() - started
                loss, weight = loss + total, weight + float(out.weight)
    return spent, loss / weight


def compare(
    name: str, sizes: list[int], tokens: int, kind: Callable[[str, list[list[int]]], Any]
) -> None:
    """Print both ways' tokens per second; raise where their losses differ."""
    groups = cuts(sizes, tokens)
    real = sum(sizes[at] for group in groups[1:] for at in group)
    found = {way: kind(way, groups) for way in ("padded", "packed")}
    for way, (spent, loss) in found.items():
        print(f"{name} {way}: {real / spent:10,.0f} tokens/s, loss {loss:.4f}")
    (slow, one), (quick, other) = found["padded"], found["packed"]
    print(f"{name}: packing is {slow / quick:.2f}x padding")
    if abs(one - other) > 1e-2 * abs(one):
        raise SystemExit(f"{name}: the losses differ")


def dflash(
    case: Any, sizes: list[int], device: str, dtype: torch.dtype, way: str, groups: list[list[int]]
) -> tuple[float, float]:
    draft, step = step_case.build(case, device, dtype, batches=way)
    if device == "cuda":
        torch.compiler.reset()
        compile_units(draft.compiled)
    spec = capture_spec(tuple(range(case.layers)), case.hidden)
    transform = DFlashTransform(spec, max(sizes), case.anchors)
    collate = DFlashCollate(step.config, spec, case.vocab - 1)

    def sample(at: int) -> Sample:
        gen = torch.Generator().manual_seed(at)
        drawn: Sample = {
            "input_ids": torch.randint(case.vocab - 1, (sizes[at],), generator=gen),
            "loss_mask": torch.ones(sizes[at], dtype=torch.uint8),
            "hidden_states": torch.randn(sizes[at], case.layers * case.hidden, generator=gen).to(
                dtype
            ),
        }
        found = transform(drawn, gen)
        assert found is not None
        return found

    batches = [to_device(collate([sample(at) for at in g]), torch.device(device)) for g in groups]
    return seconds(draft, step, batches, device == "cuda")


def eagle3(
    case: Any, sizes: list[int], device: str, dtype: torch.dtype, way: str, groups: list[list[int]]
) -> tuple[float, float]:
    draft, step = step_case_e1.build(case, device, dtype, mean_over="supervised")
    if device == "cuda":
        torch.compiler.reset()
        compile_units(draft.compiled)
    collate = specforge_collate(step.config, draft)

    def sample(at: int, length: int) -> Sample:
        gen, size = torch.Generator().manual_seed(at), sizes[at]
        chosen = torch.randint(case.draft_vocab, (size,), generator=gen)
        drawn: Sample = {
            "input_ids": torch.randint(case.vocab, (size,), generator=gen),
            "loss_mask": torch.ones(size, dtype=torch.uint8),
            "hidden_states": torch.randn(size, 3 * case.hidden, generator=gen).to(dtype),
            "final": torch.randn(size, case.hidden, generator=gen).to(dtype),
            "target_argmax": chosen * (case.vocab // case.draft_vocab),
            "target_logsumexp": torch.full((size,), 12.0),
        }
        more = length - size
        return {name: torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for name, x in drawn.items()}

    batches = []
    for group in groups:
        longest = max(sizes[at] for at in group)
        made = collate([sample(at, longest if way == "padded" else sizes[at]) for at in group])
        batches.append(to_device(made, torch.device(device)))
    return seconds(draft, step, batches, device == "cuda")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.small:
        parser.error("the shapes need a GPU. Try: --small")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}; torch {torch.__version__}")
    first = step_case.SMALL if args.small else step_case.CASES["D1"]
    second = step_case_e1.SMALL if args.small else step_case_e1.E1
    sizes = lengths(100, 2000)
    on = (sizes, device, dtype)
    first = replace(first, anchors=max(first.anchors // 4, 4))  # of a sample, not of a long row
    compare("DFlash", sizes, args.tokens, partial(dflash, first, *on))
    tokens = args.tokens
    if args.small:  # its attention is dense on a CPU, and as long as the whole row
        sizes, tokens = lengths(25, 500), tokens // 4
    compare("EAGLE-3", sizes, tokens, partial(eagle3, second, sizes, device, dtype))


if __name__ == "__main__":
    main()
