"""Capture tokens/s of Qwen3-8B's shapes on a GPU, against the products of the same tokens alone.

python benchmarks/capture_gpu.py            padded and packed, eager and compiled layers, bfloat16
python benchmarks/capture_gpu.py --small    the same code on a CPU, tiny shapes, eager alone

The floor is every product of the target's layers (and of its head, where choices and log-sum-exps
are asked for) with as many rows as there are tokens, no padding: norms and everything else come on
top.  "with attention's" adds its two products, of each token with those before it in its sequence,
at the rate of the others.  Weights are random.  Three layers and the final state are captured, as
EAGLE-3 asks.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import scale
import torch
import torch.nn.functional as F
from capture import synchronize
from transformers import Qwen3Config, Qwen3ForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import Head
from specforge_core.target.info import load_target_info
from specforge_core.target.varlen_proof import why_padded
from specforge_core.types import CaptureSpec, Prompt, TargetInfo

ROUNDS = 2


def timed(call: Callable[[], object]) -> float:
    """Return the median seconds of one call."""
    times = []
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def products(model: Any, tokens: int, *, head: bool) -> tuple[float, float]:
    """Return the seconds of every product of so many tokens, and their operations."""
    weights = [m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    weights += [model.lm_head.weight] if head else []
    widths = {weight.shape[1] for weight in weights}
    like = {"device": model.device, "dtype": model.dtype}
    inputs = {width: torch.randn(tokens, width, **like) for width in widths}  # not zeros: slower

    def run() -> None:
        for weight in weights:
            rows = 2048 if len(weight) > 100_000 else tokens  # of logits, which are wide
            for part in inputs[weight.shape[1]].split(rows):
                F.linear(part, weight)

    with torch.no_grad():
        run()  # not counted
        return timed(run), 2.0 * tokens * sum(weight.numel() for weight in weights)


def attention(config: Any, lengths: list[int]) -> float:
    """Return the operations of attention's two products, the causal half of each."""
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    width = config.num_attention_heads * config.head_dim
    return 2 * 2 * pairs * width * float(config.num_hidden_layers)


def prompts(lengths: list[int], vocab: int) -> list[Prompt]:
    rows = [torch.randint(0, vocab - 1, (length,)) for length in lengths]
    ones = torch.ones_like
    return [Prompt(index=i, input_ids=row, loss_mask=ones(row)) for i, row in enumerate(rows)]


def collect(engine: TransformersEngine, given: list[Prompt], spec: CaptureSpec) -> None:
    for _ in engine.capture(given, spec):
        pass


def make(sizes: dict[str, Any], device: str) -> tuple[Any, TargetInfo]:
    """Return a model of random weights in bfloat16, and what a run knows of it."""
    config = Qwen3Config(**sizes, dtype="bfloat16", architectures=["Qwen3ForCausalLM"])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder))
        info = load_target_info(TargetConfig(path=folder))
    return model, info


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU")
    small = parser.parse_args().small
    sizes, budget = (scale.SMALL, 256) if small else (scale.SIZES, 16384)
    device = "cpu" if small else "cuda"
    model, info = make(sizes, device)
    draw, vocab = random.Random(0), sizes["vocab_size"]
    longest = budget // 8
    asked = {
        f"8 of {longest}": prompts([longest] * 8, vocab),
        f"32 of up to {longest}": prompts(
            [draw.randint(longest // 20, longest) for _ in range(32)], vocab
        ),
    }
    count = sizes["num_hidden_layers"]
    states = CaptureSpec(layers=(1, count // 2, count - 3), final="post_norm", fields={})
    specs = {"states": states, "and head": replace(states, next_tokens=True, logsumexp=True)}
    name = device if small else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; {budget} tokens at once; shares of the products'")
    print("rate, and of theirs with attention's")
    floors = {}
    for what, given in asked.items():
        lengths = [len(prompt.input_ids) for prompt in given]
        more = attention(model.config, lengths)
        for part, spec in specs.items():
            seconds, operations = products(model, sum(lengths), head=spec.next_tokens)
            print(f"{what}, {part}: products at {operations / seconds / 1e12:,.1f} TFLOP/s")
            floors[what, part] = seconds, seconds * (1 + more / operations)
    ways = [(False, False), (True, False), (False, True), (True, True)]
    if why := why_padded(model, info, budget):
        print(f"not packed: {why}")
    for packs, compiles in ways[: 2 if small else 4]:
        if packs and why:
            continue
        head = Head(weight=model.lm_head.weight)
        padded = "" if packs else "so asked"
        engine = TransformersEngine(model, info, head, budget, compile=compiles, padded=padded)
        start = time.perf_counter()
        collect(engine, asked[f"8 of {longest}"][:2], states)
        if compiles:
            print(f"compiled in {time.perf_counter() - start:.1f} s")
        collect(engine, asked[f"32 of up to {longest}"], specs["and head"])  # not counted
        for (what, part), floor in floors.items():
            given = asked[what]
            tokens = sum(len(prompt.input_ids) for prompt in given)
            seconds = timed(partial(collect, engine, given, specs[part]))
            print(
                f"{'packed' if packs else 'padded':8}{'compiled' if compiles else 'eager':10}"
                f"{what:20}{part:9}{tokens / seconds:10,.0f} tokens/s"
                + "".join(f", {least / seconds:.1%}" for least in floor),
                flush=True,
            )


if __name__ == "__main__":
    main()
