"""Training speed by cores: whether the program chooses its threads well, whatever the machine.

python benchmarks/threads.py [-c examples/quickstart/run.yaml] [--cores 1 2 4 16] [KEY=VALUE]...

Each row is `specforge train` in a process of its own that may use so many physical cores (by
affinity; counts that the machine lacks are left out), alone, and with another process spinning
on one of them.  Threads are the program's own choice, and one for comparison, OMP_NUM_THREADS=1.
A speed is over the steady steps, the first `--skipped` not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge_core.cpu import TOPOLOGY


def physical_cores() -> list[int]:
    """Return one hardware thread of each core that this process may use."""
    seen: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list"
        seen.setdefault(siblings.read_text() if siblings.exists() else str(number), number)
    return list(seen.values())


@contextmanager
def spinning(core: int | None) -> Iterator[None]:
    """Keep one core busy, if any is named."""
    if core is None:
        yield
        return
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def speed(
    arguments: argparse.Namespace, cores: list[int], busy: bool, threads: int | None
) -> tuple[float, str]:
    """Return tokens/s of one training run, and the line that says how it computed."""
    output = Path(tempfile.mkdtemp(prefix="specforge-bench-"))
    steps = (f"train.max_steps={arguments.steps}", "train.log_every=1", "train.save_every=100000")
    run = [sys.executable, "-m", "specforge_core.cli", "train", "-c", str(arguments.config)]
    run += [*steps, f"output_dir={output / 'run'}", *arguments.overrides]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    try:
        with spinning(cores[0] if busy else None):
            done = subprocess.run(
                ["taskset", "-c", ",".join(map(str, cores)), *run],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            sys.exit(done.stderr)
        lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines][arguments.skipped :]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    chosen = next(line for line in done.stderr.splitlines() if line.startswith("training on"))
    spent = rows[-1]["seconds"] - rows[0]["seconds"]
    return (rows[-1]["tokens"] - rows[0]["tokens"]) / spent, chosen.removeprefix("training on ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training speed by cores.")
    parser.add_argument("-c", "--config", type=Path, default=Path("examples/quickstart/run.yaml"))
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--skipped", type=int, default=4)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    have = physical_cores()
    print(f"{platform.processor() or platform.machine()}, {len(have)} physical cores; tokens/s")
    print(f"{'cores':>5} {'idle':>8} {'one busy':>9} {'1 thread':>9}  chosen")
    for count in arguments.cores:
        if count > len(have):
            print(f"{count:5d}  this machine has {len(have)}", flush=True)
            continue
        idle, chosen = speed(arguments, have[:count], busy=False, threads=None)
        busy, _ = speed(arguments, have[:count], busy=True, threads=None)
        single, _ = speed(arguments, have[:count], busy=False, threads=1)
        print(f"{count:5d} {idle:8.0f} {busy:9.0f} {single:9.0f}  {chosen}", flush=True)


if __name__ == "__main__":
    main()
