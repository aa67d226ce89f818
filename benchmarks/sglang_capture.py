"""Captured tokens/s and GB/s from SGLang, against the same server's plain prefill.

python benchmarks/sglang_capture.py --python SGLANG_VENV/bin/python [--server-arg KEY=VALUE ...]

One server, started for capture, does both in turn: "plain" are the same prompts with as many
requests at once, whose ids ask for no states.  Nothing is decoded (one token each), so what a
capture forbids, the radix cache and CUDA graphs, would not help these prompts either; SGLang goes
on computing the captured layers' sums (three additions of [tokens, hidden]) in plain rounds.  A
capture counts until its samples are a batch on the device where a draft would train: through the
strategy's adapter, transform and collate, in the order of the prompts.  Each one's share of the
seconds is printed; what is left is the wait for the next states.  In a run all of this is done
beside the train step, in a thread.

Without --target the model has Qwen3-1.7B's shapes and random weights, written to TMPDIR (3.4 GB).
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from specforge_sglang.engine import SGLangEngine
from specforge_sglang_capture import spool

from specforge_core.batches.loader import to_device
from specforge_core.capture.samples import capture_in_order
from specforge_core.config import TargetConfig
from specforge_core.cpu import use_threads
from specforge_core.devices import pick_device
from specforge_core.draws import draws_of
from specforge_core.strategy import Strategy
from specforge_core.types import (
    Adapter,
    CaptureSpec,
    Collate,
    DataInfo,
    Prompt,
    Sample,
    TargetCapture,
    TargetInfo,
    Transform,
)


def write_model(path: Path, hidden: int, layers: int, vocabulary: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    del model
    torch.cuda.empty_cache()


def draw_prompts(tokens: int, length: int, vocabulary: int) -> list[Prompt]:
    """Return prompts of 0.9 to 1.1 times `length`, of about `tokens` together."""
    draw, prompts = random.Random(0), []
    for index in range(max(1, tokens // length)):
        count = draw.randint(length * 9 // 10, length * 11 // 10)
        # the last may be a mask token
        ids = torch.tensor(draw.choices(range(vocabulary - 1), k=count))
        prompts.append(Prompt(index=index, input_ids=ids, loss_mask=torch.ones_like(ids)))
    return prompts


def plain(engine: SGLangEngine, prompts: list[Prompt], at_once: int) -> float:
    """Return the seconds of the prompts' prefill alone."""
    (server,) = engine.pool.servers
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        names = [f"plain-{start}-{prompt.index}" for prompt in prompts]
        ids = [prompt.input_ids.tolist() for prompt in prompts]
        list(pool.map(server.client.prefill, ids, names))
    return time.perf_counter() - start


@dataclass
class Line:
    """From a capture to a batch, as a training run does it, with the seconds of each part."""

    strategy: Strategy
    adapter: Adapter
    transform: Transform
    collate: Collate
    device: torch.device
    batch_size: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, info: TargetInfo, options: argparse.Namespace, device: torch.device) -> Line:
        strategy = Strategy.load(options.strategy)
        section = strategy.config()(name=options.strategy, **pairs_of(options.option))
        adapter = strategy.adapter(section, info)
        counts = torch.ones(info.vocab_size, dtype=torch.int64)
        draft = strategy.draft(section, info, DataInfo(token_counts=counts, num_samples=None))
        return cls(
            strategy=strategy,
            adapter=adapter,
            transform=strategy.transform(section, adapter.spec, 2 * options.length),
            collate=strategy.collate(section, adapter.spec, draft),
            device=device,
            batch_size=options.batch_size,
        )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    @property
    def spec(self) -> CaptureSpec:
        return self.adapter.spec

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        """Return what the adapter makes of a capture, which the engine's thread hands over."""
        with self.timed("adapter"):
            return self.adapter(capture)

    def run(self, engine: SGLangEngine, prompts: list[Prompt]) -> tuple[float, int]:
        """Return the seconds until the last batch is on the device, and the samples' bytes."""
        self.seconds.clear()
        size, start = 0, time.perf_counter()
        ready: list[Sample] = []
        for index, sample in capture_in_order(self.strategy, engine, self, prompts, len(prompts)):
            assert sample is not None
            size += sum(values.nbytes for values in sample.values())
            with self.timed("transform"):
                cut = self.transform(sample, draws_of(0, 0, index))
            ready += [] if cut is None else [cut]
            if len(ready) == self.batch_size or index == prompts[-1].index:
                self._batch(ready)
                ready.clear()
        return time.perf_counter() - start, size

    def _batch(self, samples: list[Sample]) -> None:
        with self.timed("collate"):
            batch = self.collate(samples)
        with self.timed("to the device"):
            to_device(batch, self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else a share would be another's


def measure(engine: SGLangEngine, way: str, options: argparse.Namespace) -> None:
    info = engine.info
    line = Line.of(info, options, pick_device(options.train_device, "--train-device"))
    prompts = draw_prompts(options.tokens, options.length, info.vocab_size)
    total = sum(len(prompt.input_ids) for prompt in prompts)
    plain(engine, prompts, options.at_once)  # compiles kernels
    line.run(engine, prompts)  # pins memory
    pairs: list[tuple[float, float, int]] = []
    shares: dict[str, float] = defaultdict(float)
    for _ in range(options.rounds):  # in turn, so that other load hits both alike
        alone = plain(engine, prompts, options.at_once)
        pairs.append((alone, *line.run(engine, prompts)))
        for part, share in line.seconds.items():
            shares[part] += share
    alone, seconds = median(a for a, _, _ in pairs), median(b for _, b, _ in pairs)
    ratios = sorted(a / b for a, b, _ in pairs)
    speed = pairs[0][2] / seconds / 1e9
    print(
        f"{way}: {len(prompts)} prompts, {total} tokens, {options.strategy}'s layers "
        f"{line.spec.layers}, final state {line.spec.final}"
    )
    print(f"  plain prefill   {total / alone:10,.0f} tokens/s")
    print(f"  to batches      {total / seconds:10,.0f} tokens/s, {speed:.3f} GB/s")
    print(
        f"  of the plain    {median(ratios):10.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})",
    )
    spent = sum(part for _, part, _ in pairs)
    shares["wait for states"] = spent - sum(shares.values())
    told = ", ".join(f"{part} {share / spent:.1%}" for part, share in shares.items())
    print(f"  of the seconds, in batches of {options.batch_size} on {line.device}: {told}")
    rounds = ", ".join(f"{a:.2f} and {b:.2f}" for a, b, _ in pairs)
    print(f"  seconds, plain and captured, round by round: {rounds}", flush=True)


def pairs_of(texts: list[str]) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="interpreter that has SGLang")
    parser.add_argument("--target", type=Path)
    parser.add_argument("--strategy", default="linear", help="whose adapter makes the samples")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="its")
    parser.add_argument("--train-device", default="auto", help="where batches go")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a batch")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=100_000, help="of a round")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a prompt, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument(
        "--handoff", nargs="+", choices=("files", "http"), default=["files", "http"]
    )
    parser.add_argument("--directory", help="where files are handed over")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--server-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def run(target: Path, options: argparse.Namespace) -> None:
    section = {"path": str(target), "engine": "sglang", "device": options.device}
    common: dict[str, Any] = {"max_requests": options.at_once}
    common |= {"directory": options.directory} if options.directory else {}
    env = dict(text.split("=", 1) for text in options.env)
    env.setdefault("SPECFORGE_SGLANG_RECEIVERS", "127.0.0.1")
    started = {"python": options.python, "server_args": pairs_of(options.server_arg), "env": env}
    start = time.perf_counter()
    device = pick_device(options.device, "--device")
    first = SGLangEngine.load(TargetConfig(**section, options=common | started), device)
    try:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{where}, {target}: server up in {time.perf_counter() - start:.0f} s", flush=True)
        root = Path(options.directory or spool.default_root())
        print(f"{root} has {shutil.disk_usage(root).free / 1e9:.1f} GB for files", flush=True)
        (server,) = first.pool.servers
        for way in options.handoff:
            other = {"url": server.client.url, "handoff": way, "receiver_host": "127.0.0.1"}
            engine = SGLangEngine.load(TargetConfig(**section, options=common | other), device)
            try:
                measure(engine, way, options)
            finally:
                engine.close()
    finally:
        first.close()


def main() -> None:
    options = parse()
    use_threads()  # as the command line does
    if options.target is not None:
        run(options.target, options)
        return
    with tempfile.TemporaryDirectory(prefix="sglang-capture-") as directory:
        write_model(Path(directory), options.hidden, options.layers, options.vocabulary)
        run(Path(directory), options)


if __name__ == "__main__":
    main()
