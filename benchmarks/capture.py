"""Capture tokens/s, from prompts to shards on disk, against a bare forward of the same batches.

python benchmarks/capture.py [--target DIR] [--prompts 48] [--dtype bfloat16]

"bare" is the decoder alone on the same batches: no hooks, no states kept, no
LM head.  The capture takes five layers and the normed final state, so that it too runs
every layer.  Prompts are random tokens of 32 to 512; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from specforge_core.capture.manifest import CaptureIdentity
from specforge_core.capture.samples import capture_in_order, to_host
from specforge_core.capture.writer import ShardWriter
from specforge_core.config import TargetConfig
from specforge_core.devices import pick_device
from specforge_core.strategy import Strategy
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec, Field, Prompt, Sample, TargetCapture

ROUNDS = 3
TARGET = Path.home() / ".cache" / "specforge" / "smollm2-135m-instruct"


@dataclass(frozen=True)
class Concat:
    """Stores all captured layers beside each other."""

    spec: CaptureSpec

    def __call__(self, capture: TargetCapture) -> Sample:
        assert capture.final is not None
        states = [capture.hidden_states[i] for i in self.spec.layers]
        return {
            "input_ids": capture.input_ids,
            "loss_mask": capture.loss_mask,
            "hidden": torch.cat(states, -1),
            "final": capture.final,
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare(engine: TransformersEngine, prompts: list[Prompt], window: int) -> float:
    """Return the seconds that the decoder alone needs."""
    synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(prompts), window):
            asked = [p.input_ids for p in prompts[first : first + window]]
            for batch in engine._batches([len(ids) for ids in asked]):
                engine._forward([asked[i] for i in batch])
    synchronize()
    return time.perf_counter() - start


def captured(
    engine: TransformersEngine,
    adapter: Concat,
    prompts: list[Prompt],
    window: int,
    identity: CaptureIdentity,
) -> float:
    """Return the seconds from the first prompt to the complete capture on disk."""
    with tempfile.TemporaryDirectory() as name:
        synchronize()
        start = time.perf_counter()
        strategy = Strategy.load("linear")  # whose name errors would carry
        with ShardWriter(Path(name), identity, 131072) as writer:
            for index, sample in capture_in_order(strategy, engine, adapter, prompts, window):
                assert sample is not None
                writer.add(index, to_host(index, sample))
            writer.close()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    options = parser.parse_args()
    engine = TransformersEngine.load(
        TargetConfig(
            path=str(options.target), dtype=options.dtype, batch_tokens=options.batch_tokens
        ),
        pick_device("auto", "device"),
    )
    info, dtype = engine.info, str(engine.model.dtype).removeprefix("torch.")
    layers = tuple(range(1, info.num_layers - 1, max(1, (info.num_layers - 2) // 5)))[:5]
    tokens = Field(shape=(None,), dtype="int64")
    fields = {
        "input_ids": tokens,
        "loss_mask": tokens,
        "hidden": Field(shape=(None, len(layers) * info.hidden_size), dtype=dtype),
        "final": Field(shape=(None, info.hidden_size), dtype=dtype),
    }
    adapter = Concat(CaptureSpec(layers=layers, final="post_norm", fields=fields))
    identity = CaptureIdentity(
        strategy="benchmark",
        strategy_package="benchmark",
        core_version="0",
        spec_version=1,
        layers=layers,
        final="post_norm",
        fields={name: (field.shape, field.dtype) for name, field in fields.items()},
        target=info.name_or_path,
        target_revision=info.revision,
        target_fingerprint="",
        tokenizer_fingerprint="",
        chat_template_fingerprint="",
        hidden_size=info.hidden_size,
        num_layers=info.num_layers,
        vocab_size=info.vocab_size,
        max_length=512,
    )
    draw = random.Random(0)
    prompts = []
    for index in range(options.prompts):
        ids = torch.tensor(draw.choices(range(info.vocab_size), k=draw.randint(32, 512)))
        prompts.append(Prompt(index=index, input_ids=ids, loss_mask=torch.ones_like(ids)))
    total = sum(len(prompt.input_ids) for prompt in prompts)
    bare(engine, prompts[:4], options.window)  # warm up
    pairs = []
    for _ in range(ROUNDS):  # in turn, so that other load hits both alike
        alone = bare(engine, prompts, options.window)
        pairs.append((alone, captured(engine, adapter, prompts, options.window, identity)))
    device = engine.model.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
    print(f"{options.target.name}: {len(prompts)} prompts, {total} tokens, layers {layers} + final")
    print(f"bare forward      {total / median(a for a, _ in pairs):10,.0f} tokens/s")
    print(f"capture to disk   {total / median(b for _, b in pairs):10,.0f} tokens/s")
    print(f"capture reaches   {median(a / b for a, b in pairs):10.1%} of the bare forward")


if __name__ == "__main__":
    main()
