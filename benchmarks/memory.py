"""The memory of a training step: what `train --plan` expects of it, and what it comes to.

python benchmarks/memory.py            a GPU, bfloat16, Qwen3-8B shapes: cases D1 and E1 of step.py
python benchmarks/memory.py --small    the same code on a CPU: what is expected alone

As in step.py the weights and their gradients are in bfloat16 and nothing is sharded; each case is
run with and without `train.recompute`.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping
from typing import Any

import step_case
import step_case_e1
import torch

from specforge_core.compiled import compile_units, recompute_units
from specforge_core.train.memory import before_last
from specforge_core.types import Batch, Draft, Planned

GIB = 2**30
NEAR = 0.1


def expected(draft: Draft, step: Planned, tokens: int, recompute: bool) -> dict[str, int]:
    """Return bytes by what they are for when a step holds most."""
    assert draft.frozen is not None
    weights = list(draft.model.parameters())
    item = weights[0].element_size()
    held = {
        "the draft's weights": item * sum(p.numel() for p in weights),
        "the target's embedding and head": sum(p.nbytes for p in draft.frozen.parameters()),
    }
    states = dict(step.step_bytes(draft, tokens, 1, item, recompute=recompute))
    if recompute and (done := before_last(draft)):
        states["gradients of units before"] = item * done
    gradients = item * sum(p.numel() for p in weights if p.requires_grad)
    if sum(states.values()) < gradients:
        states = {"gradients": gradients}
    return {**held, **states}


def measured(draft: Draft, step: Any, batch: Batch, recompute: bool) -> int:
    """Return the most bytes that were allocated during a step."""
    compile_units(draft.compiled, inner=recompute)
    if recompute:
        recompute_units(draft.compiled)
    for _ in range(3):
        draft.model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        out = step(draft, batch, step_case.context())
        torch.autograd.backward(out.loss_sum / out.weight)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def cases(small: bool, device: str, dtype: torch.dtype) -> Mapping[str, Any]:
    """Return what makes each case's draft, step, batch and tokens."""

    def dflash() -> tuple[Draft, Any, Batch, int]:
        case = step_case.SMALL if small else step_case.CASES["D1"]
        draft, step = step_case.build(case, device, dtype)
        return draft, step, step_case.random_batch(case, step, device, dtype), case.length

    def eagle3(train_head: bool) -> tuple[Draft, Any, Batch, int]:
        case = step_case_e1.SMALL if small else step_case_e1.E1
        draft, step = step_case_e1.build(case, device, dtype, train_head=train_head)
        return draft, step, step_case_e1.random_batch(case, draft, step, dtype), case.length

    return {
        "D1": dflash,
        "E1, head trained": lambda: eagle3(True),
        "E1, head frozen": lambda: eagle3(False),
    }


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the code")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.small:
        parser.error("the cases need a GPU. Try: --small")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}; torch {torch.__version__}")
    far = []
    for name, build in cases(args.small, device, dtype).items():
        for recompute in (False, True):
            gc.collect()  # what was measured before, and compiled, is not held
            torch.compiler.reset()
            draft, step, batch, tokens = build()
            parts = expected(draft, step, tokens, recompute)
            total = sum(parts.values())
            title = f"{name}{', recompute' if recompute else ''}"
            print(f"\n{title}: expected {total / GIB:.3f} GiB")
            for part, size in parts.items():
                print(f"  {part:46} {size / 2**20:10,.2f} MiB")
            if on_gpu:
                peak = measured(draft, step, batch, recompute)
                off = total / peak - 1
                print(f"measured {peak / GIB:.3f} GiB; expected is off by {off:+.1%}")
                far += [title] if abs(off) > NEAR else []
            del draft, step, batch
    if far:
        raise SystemExit(f"off by more than {NEAR:.0%}: {'; '.join(far)}")


if __name__ == "__main__":
    main()
