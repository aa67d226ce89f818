"""Where a training step's time goes: data wait, capture, forward, backward, optimizer.

python benchmarks/train_step.py -c examples/quickstart/run.yaml [KEY=VALUE]...

Runs 30 steps of the real trainer twice, with `train.profile`: online, where the target captures
the next batches in a thread beside the training, and offline over the same samples.  The
capture alone is timed in between; online its time shows only as far as training waits for it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch

from specforge_core.capture.job import run_capture
from specforge_core.load import load_config
from specforge_core.train.run import train

STEPS, SKIPPED = 30, 10  # the first steps warm caches up
PHASES = ("data", "forward", "backward", "optimizer")


def phases(output: Path) -> dict[str, float]:
    """Return milliseconds of a step by phase, and of the whole step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = rows[-1]["step"] - rows[0]["step"]
    found = {name: 1e3 * sum(r[f"seconds_{name}"] for r in rows[1:]) / steps for name in PHASES}
    return found | {"step": 1e3 * (rows[-1]["seconds"] - rows[0]["seconds"]) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description="Split the time of a training step.")
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="specforge-bench-"))
    common = (
        *("train.profile=true", f"train.max_steps={STEPS}", f"train.log_every={SKIPPED}"),
        *arguments.overrides,
    )
    try:
        run, strategy = load_config(arguments.config, (*common, f"output_dir={work / 'online'}"))
        train(run, strategy)
        samples = STEPS * run.train.batch_size * run.train.accumulate
        stored = (f"data.capture_dir={work / 'capture'}", f"data.limit={samples}")
        options = (*common, *stored, f"output_dir={work / 'offline'}")
        run, strategy = load_config(arguments.config, options)
        start = time.perf_counter()
        manifest = run_capture(run, strategy)
        capture = 1e3 * (time.perf_counter() - start) / STEPS
        train(run, strategy)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
        print(f"{manifest.num_tokens / STEPS:.0f} tokens a step; milliseconds a step:")
        print(f"{'':<10}" + "".join(f"{name:>11}" for name in (*PHASES, "step", "capture")))
        for name in ("online", "offline"):
            found = phases(work / name)
            cells = "".join(f"{value:11.1f}" for value in found.values())
            print(f"{name:<10}{cells}{capture:11.1f}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
