"""Every number of docs/performance.md in one call, and one table of them at the end.

python benchmarks/all.py --work /dev/shm/all --gpus 1        on one GPU, in under 9 minutes
python benchmarks/all.py --work /dev/shm/all --gpus 1,2 --pieces eagle3-offline,dflash-online
python benchmarks/all.py --work /tmp/all --smoke --gpus 1,2  tiny shapes on a CPU, to try the code

Steps alone (step.py), then runs of the installed command (scale.py).  Each piece has a process
group of its own, which is killed when the piece is done or its time is up.  What a piece came to
is kept in WORK/all.json: the same command goes on with those that `--minutes` left no time for.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import scale
import torch

LARGE = replace(scale.CASES["dflash-online"], batch_size=8, data="long.jsonl")
BASE = ("eagle3-offline", "dflash-online", "eagle3-online")
TOKENS = tuple(f"{name}-tokens" for name in BASE)
RUNS = {name: scale.CASES[name] for name in BASE + TOKENS}
ALONE = ("D1", "E1", "dflash-warm", "dflash-large")  # on one GPU whatever --gpus says
PIECES = (*ALONE[:2], *BASE[:2], *ALONE[2:], BASE[2], *TOKENS)
SPARE = 8.0  # seconds of the time that is left for what follows
Found = dict[str, Any]


def step(case: str, seconds: float, *, small: bool) -> Found:
    """Return the milliseconds and GiB that step.py prints of a case, in its order."""
    script = Path(__file__).with_name("step.py")
    asked = [sys.executable, str(script), "--case", case, *(["--small"] if small else [])]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(asked, stdout=told, stderr=told, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {seconds:.0f} s"}
        finally:
            scale.end(process)
        told.seek(0)
        return found_in(told.read().decode())


def found_in(text: str) -> Found:
    """Return the numbers of step.py's output, or its end where there are none."""
    times = re.findall(r"^step \(forward \+ backward\).*: ([\d.]+) ms", text, re.MULTILINE)
    floors = re.findall(r"^floor: .*rate: ([\d.]+) ms", text, re.MULTILINE)
    peaks = re.findall(r"^peak memory: ([\d.]+) GiB", text, re.MULTILINE)
    if not times:
        return {"failed": text[-1500:]}
    return {"ms": [*map(float, times)], "floor": [*map(float, floors)], "gib": [*map(float, peaks)]}


def trained(work: Path, name: str, gpus: int, seconds: float, *, small: bool, steps: int) -> Found:
    """Return what a run of the installed command came to.

    On one GPU nothing is compiled before; on more, what that run left is used, and by
    `dflash-warm` and by cuts of tokens what the run of that method and data left.
    """
    case = {"dflash-large": LARGE, "dflash-warm": RUNS["dflash-online"]}.get(name) or RUNS[name]
    like = "dflash-online" if name == "dflash-warm" else name.removesuffix("-tokens")
    compiled = work / "compiled" / like
    if name == "dflash-warm" and not compiled.exists():
        return {"failed": "it needs what dflash-online compiles. Try: --pieces dflash-online"}
    if gpus == 1 and name == like:
        shutil.rmtree(compiled, ignore_errors=True)
    # each GPU of a machine has kernels of its own
    cold = not compiled.exists() or len([*compiled.glob("gpu-*")]) < gpus
    caches = {n: str(compiled / n) for n in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    began = time.monotonic()
    config = scale.prepare(work, name, case, small=small)
    left = seconds - (time.monotonic() - began)
    row = scale.measure(config, gpus, 10 if name in ALONE else steps, left, caches)
    for gpu in range(gpus):
        (compiled / f"gpu-{gpu}").mkdir(parents=True, exist_ok=True)
    return {"failed": row} if isinstance(row, str) else asdict(row) | {"cold": cold}


def table(results: dict[str, Found], gpus: list[int]) -> list[str]:
    """Return the lines of the table: what was measured, and what is to be reached."""
    out = [f"{'what':46}{'measured':>24}   to reach"]

    def line(what: str, key: str, told: Callable[[Found], str], reach: str) -> None:
        found = results.get(key)
        value = "not run" if found is None else "FAILED" if "failed" in found else told(found)
        out.append(f"{what:46}{value:>24}   {reach}")

    def of_step(at: int) -> Callable[[Found], str]:
        return lambda f: f"{f['ms'][at]:.1f} ms" + (f", {f['gib'][at]:.1f} GiB" if f["gib"] else "")

    def idle(found: Found) -> str:
        return "unknown" if found.get("idle") is None else f"{100 * found['idle']:.1f} %"

    def first(found: Found) -> str:
        return f"{found['first']:.0f} s, {'cold' if found['cold'] else 'warm'}"

    line("D1 DFlash step", "D1 1", of_step(0), "115 ms, 9 GiB")
    line("E1 EAGLE-3 step, head trained", "E1 1", of_step(0), "51 ms")
    line("E1 EAGLE-3 step, head frozen", "E1 1", of_step(1), "47 ms")
    for name in RUNS:
        for count in gpus:
            key, one = f"{name} {count}", results.get(f"{name} 1", {})

            def rate(found: Found, one: Found = one, count: int = count) -> str:
                same = count > 1 and "tokens" in one and one["machine"] == found["machine"]
                times = f" ({found['tokens'] / one['tokens']:.2f}x)" if same else ""
                return f"{found['tokens']:,.0f} tokens/s{times}"

            line(f"{name}, {count} GPU(s)", key, rate, f"{0.96 * count:.2f}x" if count > 1 else "")
            line("  waiting for data", key, lambda f: f"{100 * f['waiting']:.1f} %", "under 2 %")
            line("  GPUs without a kernel", key, idle, "under 5 %")
            shown = "  longest step after the third"
            line(shown, key, lambda f: f"{f['longest']:.2f} s of {f['steps']} steps", "1.5 s")
            line("  first line of metrics", key, first, "45 s cold, 20 s warm")
    line("dflash-online again, first line", "dflash-warm 1", first, "20 s")
    fits = "fits, or says what to lower"
    large = "DFlash, batch of 8 x 2,048 tokens"
    line(large, "dflash-large 1", lambda f: f"{f['tokens']:,.0f} tokens/s", fits)
    starts = {key: found["start"] for key, found in results.items() if "start" in found}
    for key, start in starts.items():  # of results kept from before there are none
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items())
        out.append(f"first line of {key}, seconds: {spent}")
    failed = {key: found["failed"] for key, found in results.items() if "failed" in found}
    return [*out, *(f"\n{key} FAILED: {why}" for key, why in failed.items())]


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--work", type=Path, required=True, help="target, data, captures (40 GB)")
    parser.add_argument("--gpus", default="1", help="as 1,2")
    parser.add_argument("--pieces", default=",".join(PIECES), help="in this order; or some of them")
    parser.add_argument("--minutes", type=float, default=9.0, help="no piece goes on after that")
    parser.add_argument("--seconds", type=float, default=150.0, help="a piece, at most")
    parser.add_argument("--steps", type=int, default=80, help="of a run")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the code")
    asked = parser.parse_args()
    until, small, work = time.monotonic() + 60 * asked.minutes, asked.smoke, asked.work
    pieces, gpus = asked.pieces.split(","), [int(count) for count in asked.gpus.split(",")]
    if unknown := [name for name in pieces if name not in PIECES]:
        parser.error(f"there is no piece {unknown[0]}. Try: {','.join(PIECES)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not small:
        parser.error("the pieces need a GPU. Try: --smoke")
    work.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    machine = f"{card}, torch {torch.__version__}, {boot_id()}"
    kept = work / "all.json"
    results: dict[str, Found] = json.loads(kept.read_text()) if kept.exists() else {}
    try:
        for name in pieces:
            for count in [1] if name in ALONE else gpus:
                key, left = f"{name} {count}", until - time.monotonic() - SPARE
                if key in results and "failed" not in results[key]:
                    continue
                if left < (5 if small else 30):
                    print(f"{key}: no time is left; the same command goes on with it", flush=True)
                    continue
                began, most = time.monotonic(), min(left, asked.seconds)
                if name in ALONE[:2]:
                    found = step(name, most, small=small)
                else:
                    scale.make(work, small=small)
                    most = min(most, until - time.monotonic() - SPARE)
                    found = trained(work, name, count, most, small=small, steps=asked.steps)
                results[key] = {"machine": machine, **found}
                kept.write_text(json.dumps(results, indent=1))
                ended = "failed" if "failed" in found else "done"
                print(f"{key}: {ended} in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        print(f"\n{machine}\n" + "\n".join(table(results, gpus)), flush=True)


def boot_id() -> str:
    """Return what tells one machine, since it was started, from another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


if __name__ == "__main__":
    main()
