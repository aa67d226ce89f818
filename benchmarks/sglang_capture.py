"""Captured tokens/s and GB/s from SGLang, against the same server's plain prefill.

python benchmarks/sglang_capture.py --python SGLANG_VENV/bin/python [--target DIR] [--url URL]

"plain" sends the same prompts with as many requests at once, and takes no states.  The capture
takes five layers and the normed final state, until they are tensors in this process.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from specforge_sglang.engine import SGLangEngine

from specforge_core.config import TargetConfig
from specforge_core.types import CaptureSpec, Prompt

ROUNDS = 3
TARGET = Path.home() / ".cache" / "specforge" / "smollm2-135m-instruct"


def plain(engine: SGLangEngine, prompts: list[Prompt], at_once: int) -> float:
    """Return the seconds of the prompts' prefill alone."""
    (server,) = engine.pool.servers
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        names = [f"plain-{start}-{prompt.index}" for prompt in prompts]
        ids = [prompt.input_ids.tolist() for prompt in prompts]
        list(pool.map(server.client.prefill, ids, names))
    return time.perf_counter() - start


def captured(engine: SGLangEngine, prompts: list[Prompt], spec: CaptureSpec) -> tuple[float, int]:
    """Return the seconds until all states are here, and their bytes."""
    size, start = 0, time.perf_counter()
    for capture in engine.capture(prompts, spec):
        assert capture.final is not None
        size += capture.final.nbytes + sum(s.nbytes for s in capture.hidden_states.values())
    return time.perf_counter() - start, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="interpreter that has SGLang")
    parser.add_argument("--url", help="a running server instead")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="longest prompt, in tokens")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--handoff", choices=("files", "http"), default="files")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    section: dict[str, Any] = {"max_requests": options.at_once, "handoff": options.handoff}
    section |= {"url": options.url} if options.url else {"python": options.python}
    section |= {"receiver_host": "127.0.0.1"} if options.handoff == "http" else {}
    target = TargetConfig(
        path=str(options.target), engine="sglang", device=options.device, options=section
    )
    engine = SGLangEngine.load(target)
    try:
        info, draw = engine.info, random.Random(0)
        layers = tuple(range(1, info.num_layers - 1, max(1, (info.num_layers - 2) // 5)))[:5]
        spec = CaptureSpec(layers, "post_norm", {})
        prompts = []
        for index in range(options.prompts):
            count = draw.randint(options.length // 4, options.length)
            ids = torch.tensor(draw.choices(range(info.vocab_size), k=count))
            prompts.append(Prompt(index, ids, torch.ones_like(ids)))
        total = sum(len(prompt.input_ids) for prompt in prompts)
        for warm in (prompts[:4], prompts[:4]):
            plain(engine, warm, options.at_once)
            captured(engine, warm, spec)
        pairs = []
        for _ in range(ROUNDS):  # in turn, so that other load hits both alike
            alone = plain(engine, prompts, options.at_once)
            pairs.append((alone, *captured(engine, prompts, spec)))
    finally:
        engine.close()
    seconds = median(b for _, b, _ in pairs)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, {options.target.name}: {len(prompts)} prompts, {total} tokens")
    print(f"layers {layers} and the normed final state")
    print(f"plain prefill     {total / median(a for a, _, _ in pairs):10,.0f} tokens/s")
    print(f"capture           {total / seconds:10,.0f} tokens/s")
    print(f"                  {pairs[0][2] / seconds / 1e9:10.3f} GB/s over {options.handoff}")
    print(f"capture reaches   {median(a / b for a, b, _ in pairs):10.1%} of the plain prefill")


if __name__ == "__main__":
    main()
