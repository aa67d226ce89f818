"""Tokens/s of the installed `specforge train` on 1, 2, 4 ... GPUs, and where the time goes.

python benchmarks/scale.py --work /dev/shm/scale --gpus 1,2,4
python benchmarks/scale.py --work /tmp/scale --gpus 1,2 --small       on a CPU, to try the code

Qwen3-8B's shapes with random weights, conversations of 100 to 2,000 random tokens: nothing is
downloaded.  What is there of target, data and capture from a run before is used again.  Each
row of the table is one real run, ended once it has logged enough steps: tokens/s and the share
of time that rank 0 waited for data over the steps after the first quarter, the longest step
after the third, and seconds from the command to its first line.  Where those went is below the
row, as that line says it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from idle import Idle
from transformers import Qwen3Config, Qwen3ForCausalLM

from specforge_core.testing.toy import toy_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
SMALL = SIZES | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
}
LENGTHS = (100, 2000)
# as a user's: else each process compiles some 2,800 modules
KEPT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
EAGLE3 = {"name": "eagle3", "draft_vocab_size": 32000}
DFLASH = {"name": "dflash", "block_size": 16, "num_layers": 5, "num_anchors": 512}
FEWER = {
    "eagle3": {"draft_vocab_size": 500, "steps": 3, "layers": [0, 2, 4]},
    "dflash": {"num_anchors": 16, "num_capture_layers": 3},
}


@dataclass(frozen=True)
class Case:
    """One row of the table, for every number of GPUs."""

    strategy: dict[str, Any]
    batch_size: int
    offline: bool
    options: dict[str, Any] = field(default_factory=dict)
    data: str = "data.jsonl"


CASES = {
    "eagle3-offline": Case(EAGLE3, 4, True),
    "eagle3-online": Case(EAGLE3, 4, False),
    "dflash-offline": Case(DFLASH, 2, True),
    "dflash-online": Case(DFLASH, 2, False),
}
# the same by tokens: ranks have as much to do as each other, which few samples cannot
CASES |= {f"{name}-tokens": replace(c, options={"batch_tokens": 8192}) for name, c in CASES.items()}


def make_target(path: Path, sizes: dict[str, Any]) -> None:
    """Save a random model, in bfloat16."""
    if (path / "config.json").exists():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = toy_tokenizer()
    config = Qwen3Config(**sizes, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="4GB")
    tokenizer.save_pretrained(path)


def make_data(path: Path, count: int, vocab: int, lengths: tuple[int, int]) -> None:
    """Write conversations as token rows: about a third is the prompt."""
    if path.exists():
        return
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            length = draw.randint(*lengths)
            prompt = draw.randint(length // 5, length // 2)
            ids = [draw.randrange(300, vocab - 300) for _ in range(length)]
            mask = [0] * prompt + [1] * (length - prompt)
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")


def write_config(path: Path, work: Path, case: Case, *, small: bool) -> None:
    strategy = case.strategy | (FEWER[case.strategy["name"]] if small else {})
    if case.strategy["name"] == "dflash":  # random tokens, so that one has to be spared
        strategy = strategy | {"mask_token_id": (SMALL if small else SIZES)["vocab_size"] - 1}
    train = {
        "max_steps": 100_000,  # it is ended before
        "batch_size": case.batch_size,
        "schedule": "constant",
        "save_every": 10**6,
        "log_every": 1,
    }
    config = {
        "target": {"path": str(work / "target"), "dtype": "bfloat16", "batch_tokens": 16384},
        "strategy": strategy,
        "data": {"train": [str(work / case.data)], "max_length": 2048},
        "output_dir": str(path.with_suffix("")),
        "train": train | case.options,
    }
    if case.offline:
        config["data"]["capture_dir"] = str(work / f"capture-{case.strategy['name']}")
    path.write_text(json.dumps(config))  # JSON is YAML


def make(work: Path, *, small: bool, conversations: int = 600) -> None:
    """Make the random target and the data, of mixed lengths and of 2,048 tokens each."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if small else SIZES
    lengths, longest = ((20, 100), 100) if small else (LENGTHS, 2048)
    make_target(work / "target", sizes)
    make_data(work / "data.jsonl", conversations, sizes["vocab_size"], lengths)
    make_data(work / "long.jsonl", 64, sizes["vocab_size"], (longest, longest))
    torch.cuda.empty_cache()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "specforge_core.cli", *arguments]


def lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run and its ranks, which are in groups of their own: a checkpoint takes seconds."""
    for pid in [*_children(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.wait()


def _children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(stat.parent.name)


@dataclass(frozen=True)
class Row:
    """What one run came to; of the steps after the first quarter, where it does not say more."""

    tokens: float  # a second
    step_ms: float  # median
    waiting: float  # part of the time that rank 0 waits for data
    longest: float  # seconds, of the steps after the third
    longest_step: int
    first: float  # seconds from the command to the first line of metrics
    steps: int
    loss: float
    idle: float | None  # part of the time that GPUs ran no kernel; None where that is not known
    start: dict[str, float]  # where `first` went: seconds of each phase in the first line

    @property
    def cells(self) -> str:
        return (
            f"{self.tokens:10,.0f} {self.step_ms:9.1f} {100 * self.waiting:8.1f}"
            f" {self.longest:8.2f} @{self.longest_step:<4} {self.first:8.1f} {self.steps:6}"
            f" {self.loss:8.3f}"
            + ("" if self.idle is None else f"  {100 * self.idle:.1f} % without a kernel")
            + f"\n{'':16}first line: "
            + ", ".join(f"{name} {spent:.1f}" for name, spent in self.start.items())
        )


def measure(
    config: Path, gpus: int, steps: int, seconds: float, environment: dict[str, str] | None = None
) -> Row | str:
    """Train until there are so many steps, or time is up; return why where it came to nothing."""
    output = config.with_suffix("")
    shutil.rmtree(output, ignore_errors=True)
    began = time.monotonic()
    log = config.with_suffix(".log")
    with log.open("w") as told, Idle(gpus) as idle:
        asked = command("train", "-c", str(config), "--nproc", str(gpus), "--debug")
        given = KEPT | (environment or {})
        process = subprocess.Popen(
            asked, stdout=told, stderr=told, start_new_session=True, env=given
        )
        first = None
        try:
            while time.monotonic() - began < seconds and process.poll() is None:
                rows = lines(output / "metrics.jsonl")
                if rows and first is None:
                    first = time.monotonic() - began
                if len(rows) <= steps // 4:
                    idle.begin()
                if len(rows) >= steps:
                    break
                time.sleep(0.1)
            share = idle.share()
        finally:
            end(process)
    rows = lines(output / "metrics.jsonl")[:steps]
    if len(rows) < 8 or first is None:
        return f"only {len(rows)} steps in {seconds:.0f} s: {log.read_text()[-1500:]}"
    steady = rows[len(rows) // 4 :]
    spent = steady[-1]["seconds"] - steady[0]["seconds"]
    times = [b["seconds"] - a["seconds"] for a, b in pairwise(rows)]
    longest = max(range(3, len(times)), key=times.__getitem__)
    phases = {k.removeprefix("seconds_"): v for k, v in rows[0].items() if k.startswith("seconds_")}
    return Row(
        tokens=(steady[-1]["tokens"] - steady[0]["tokens"]) / spent,
        step_ms=1e3 * median(times[len(times) // 4 :]),
        waiting=sum(row["seconds_data"] for row in steady[1:]) / spent,
        longest=times[longest],
        longest_step=longest + 2,
        first=first,
        steps=len(rows),
        loss=sum(row["loss"] for row in steady) / len(steady),
        idle=share,
        start=phases,
    )


def prepare(work: Path, name: str, case: Case, *, small: bool) -> Path:
    """Write a case's config, capture what it trains on if that is not there; return the config."""
    config = work / f"{name}.json"
    write_config(config, work, case, small=small)
    directory = work / f"capture-{case.strategy['name']}"
    if case.offline and not (directory / "manifest.json").exists():
        done = subprocess.run(command("capture", "-c", str(config)), capture_output=True)
        if done.returncode:
            sys.exit(done.stderr.decode())
    return config


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--work", type=Path, required=True, help="target, data, captures (40 GB)")
    parser.add_argument("--gpus", default="1", help="as 1,2,4")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300, help="a run, at most")
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the code")
    arguments = parser.parse_args()
    work, small = arguments.work, arguments.small
    make(work, small=small, conversations=arguments.conversations)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}")
    print(
        f"{'':16}{'GPUs':>5}{'tokens/s':>11}{'ms a step':>10}{'% data':>9}{'longest s':>15}"
        f"{'first s':>9}{'steps':>7}{'loss':>9}",
        flush=True,
    )
    for name in filter(None, arguments.cases.split(",")):
        config = prepare(work, name, CASES[name], small=small)
        for gpus in map(int, arguments.gpus.split(",")):
            row = measure(config, gpus, arguments.steps, arguments.seconds)
            print(f"{name:16}{gpus:5} {row if isinstance(row, str) else row.cells}", flush=True)


if __name__ == "__main__":
    main()
