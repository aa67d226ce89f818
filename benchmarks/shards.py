"""Read a capture's samples, against reading the same bytes raw.

python benchmarks/shards.py [--megabytes 1024] [--length 512] [--width 2880] [--directory /tmp]

The page cache is warm in both cases, and the best of several rounds counts, since
other load only ever slows a round down.  "raw" is `read` into new memory, a sample's
bytes at a time; "raw, reused" reads into one buffer, which a reader of samples cannot.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from specforge_core.capture.manifest import CaptureIdentity, CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.capture.writer import ShardWriter

ROUNDS = 9


def identity(width: int) -> CaptureIdentity:
    tokens = ((None,), "int64")
    return CaptureIdentity(
        strategy="benchmark",
        strategy_package="benchmark",
        core_version="0",
        spec_version=1,
        layers=(0,),
        final="none",
        fields={
            "input_ids": tokens,
            "loss_mask": tokens,
            "hidden": ((None, width), "bfloat16"),
        },
        target="random",
        target_revision=None,
        target_fingerprint="",
        tokenizer_fingerprint="",
        chat_template_fingerprint="",
        hidden_size=width,
        num_layers=1,
        vocab_size=1000,
        max_length=1 << 20,
    )


def write(directory: Path, megabytes: int, length: int, width: int) -> float:
    """Write random samples of about `length` tokens; return GB/s."""
    draw = random.Random(0)
    state = torch.randn(2 * length, width).bfloat16()
    left, index = megabytes * 10**6, 0
    start = time.perf_counter()
    with ShardWriter(directory, identity(width), 131072 * 2880 // width) as writer:
        while left > 0:
            tokens = draw.randint(length // 2, 3 * length // 2)
            ids = torch.zeros(tokens, dtype=torch.int64)
            sample = {"input_ids": ids, "loss_mask": ids, "hidden": state[:tokens]}
            writer.add(index, sample)
            left -= sum(tensor.nbytes for tensor in sample.values())
            index += 1
        writer.close()
    return megabytes / 1000 / (time.perf_counter() - start)


def timed(work: Callable[[], int]) -> float:
    """Return GB/s of one round."""
    start = time.perf_counter()
    read = work()
    return read / 1e9 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512, help="tokens in a sample, about")
    parser.add_argument("--width", type=int, default=2880, help="bfloat16 values of a token")
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        written = write(directory, options.megabytes, options.length, options.width)
        reader = ShardReader(directory, CaptureManifest.read(directory))
        order = random.Random(1).sample(range(len(reader)), len(reader))
        files = [directory / shard.file for shard in reader.manifest.shards]
        piece = options.length * (2 * options.width + 16)

        def samples() -> int:
            return sum(sum(t.nbytes for t in reader[i].values()) for i in range(len(reader)))

        def shuffled() -> int:
            return sum(sum(t.nbytes for t in reader[i].values()) for i in order)

        def raw() -> int:
            total = 0
            for file in files:
                with file.open("rb", 0) as source:
                    while part := os.read(source.fileno(), piece):
                        total += len(part)
            return total

        def reused() -> int:
            total, buffer = 0, bytearray(piece)
            for file in files:
                with file.open("rb", 0) as source:
                    while count := source.readinto(buffer):
                        total += count
            return total

        ways = {
            "samples, as stored": samples,
            "samples, shuffled": shuffled,
            "raw": raw,
            "raw, reused": reused,
        }
        results: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(ROUNDS):  # in turn, so that other load hits all alike
            for label, work in ways.items():
                results[label].append(timed(work))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{options.megabytes} MB in {len(files)} shards, {len(order)} samples")
    print(f"write, fsync included   {written:6.2f} GB/s")
    rates = {label: max(rounds) for label, rounds in results.items()}
    for label, rate in rates.items():
        print(f"{label:22s}  {rate:6.2f} GB/s  {rate / rates['raw']:5.0%} of raw")


if __name__ == "__main__":
    main()
