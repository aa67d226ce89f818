"""The whole path on a real model: target, training, lossless evaluation, export, report.

    make quickstart
    python examples/quickstart/quickstart.py [--short] [KEY=VALUE]...

Run from the root of the checkout.  Writes outputs/quickstart/report.json and two plots.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG = HERE / "run.yaml"
TARGET = Path("~/.cache/specforge/smollm2-135m-instruct").expanduser()
FEW = ("eval.limit=1", "eval.max_new_tokens=48")  # decoded while training, to find the best
SHORT = (
    "train.max_steps=3",
    "train.batch_size=1",
    "capture.window=3",
    "data.max_length=128",
    "eval.limit=1",
    "eval.max_new_tokens=16",
)


def step(title: str, *command: str) -> str:
    """Run one command, show its messages, return what it printed."""
    print(f"\n== {title}\n   $ {' '.join(command[2:])}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def specforge(title: str, *arguments: str) -> str:
    return step(title, sys.executable, "-m", "specforge_core.cli", *arguments)


def loss_curve(output: Path) -> list[dict[str, float]]:
    """Return step, tokens, loss and seconds of every logged step; not of measurements."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "seconds")
    return [{key: row[key] for key in keys} for row in rows if "loss" in row]


def report(output: Path, evaluated: dict[str, Any], started: float) -> dict[str, Any]:
    """Return the contents of report.json."""
    from specforge_core.drafts.checkpoint import find, read_state

    curve = loss_curve(output)
    sets = evaluated["per_set"]
    return {
        "acceptance_length": evaluated["acceptance_length"],
        "per_set": {name: found["acceptance_length"] for name, found in sets.items()},
        "lossless": evaluated["lossless"],
        "train_seconds": round(curve[-1]["seconds"], 1),
        "train_tokens": int(curve[-1]["tokens"]),
        "tokens_per_second": round(curve[-1]["tokens"] / curve[-1]["seconds"], 1),
        "computed": read_state(find(output)).machine,
        "best_step": read_state(find(Path(f"{output}@best"))).step,
        "total_seconds": round(time.monotonic() - started, 1),
        "loss_curve": curve,
        "evaluation": evaluated,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("specforge-core", "torch", "transformers")},
    }


def show(found: dict[str, Any], output: Path) -> None:
    from specforge_core.train.machine import Machine

    curve = found["loss_curve"]
    marks = [curve[i * (len(curve) - 1) // 4] for i in range(5)]
    losses = "  ".join(f"{row['loss']:.2f} @ {row['step']:.0f}" for row in marks)
    sets = "  ".join(f"{name} {length:.3f}" for name, length in found["per_set"].items())
    print(
        f"\n== report ({output / 'report.json'})\n"
        f"   trained on        {found['train_tokens']:,} tokens in {found['train_seconds']:.0f} s, "
        f"{found['tokens_per_second']:.0f} tokens/s\n"
        f"   best checkpoint   step {found['best_step']}, by acceptance while training\n"
        f"   computed on       {Machine(**found['computed'])}\n"
        f"   loss              {losses} (step)\n"
        f"   acceptance length {found['acceptance_length']:.3f}   ({sets})\n"
        f"   greedy output     {found['evaluation']['lossless_reason']}\n"
        f"   whole command     {found['total_seconds']:.0f} s\n"
        f"   plots             {output / 'loss.png'}  {output / 'acceptance.png'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure a draft of SmolLM2-135M.")
    parser.add_argument("--short", action="store_true", help="a few steps: does it run at all?")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    started = time.monotonic()
    output: Path = arguments.output
    run = ["-c", str(CONFIG), f"output_dir={output}"]
    more = [*(SHORT if arguments.short else ()), *arguments.overrides]
    best = Path(f"{output}@best")

    if not (TARGET / "config.json").exists():
        step("the target", sys.executable, str(HERE / "target.py"), str(TARGET))
    print(specforge("train", "train", *run, *FEW, *more), end="")
    printed = specforge(
        "evaluate on held-out prompts", "eval", *run, *more, "--draft", str(best), "--json"
    )
    export = ("--checkpoint", str(best), "--format", "sglang", "-o", str(output / "export"))
    print(specforge("export", "export", *export, "--force"), end="")

    from specforge_core.evaluate.plot import plot_loss

    plot_loss(output / "metrics.jsonl", output / "loss.png")
    shutil.copyfile(output / "eval" / "acceptance.png", output / "acceptance.png")
    found = report(output, json.loads(printed), started)
    beside = output / ".report.json.tmp"
    beside.write_text(json.dumps(found, indent=2) + "\n")
    beside.replace(output / "report.json")
    show(found, output)


if __name__ == "__main__":
    main()
