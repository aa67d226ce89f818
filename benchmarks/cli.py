"""How long `specforge --help` and `specforge strategies` take, as whole processes.

python benchmarks/cli.py

Beside them `python -c pass`, which nothing written in Python can undercut.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

RUNS = 15
GOAL = 150.0  # ms
SCRIPT = str(Path(sys.executable).with_name("specforge"))


def milliseconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    floor = [sys.executable, "-c", "pass"]
    commands = {"python -c pass": floor} | {
        f"specforge {name}": [SCRIPT, name] for name in ("--help", "strategies")
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS + 1):
        for name, command in commands.items():  # in turn, so that drift hits all alike
            times[name].append(milliseconds(command))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for name, found in times.items():
        middle = median(found[1:])
        print(f"{name:<22} {middle:6.1f} ms  (goal: under {GOAL:.0f} ms)")


if __name__ == "__main__":
    main()
