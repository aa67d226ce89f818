"""Seconds until rows of many conversations can be trained on, and memory: tokenized and kept.

python benchmarks/data.py TARGET [--count 200000] [--folder DIR] [--workers 1 2]

TARGET is a model whose tokenizer and template are used, as the quickstart's.  Each line is a
process of its own, its imports not counted.  "first" is the first group of rows, with which
training over `train.max_steps` begins, "all" the last row.  Memory is what the process and its
workers hold beyond what they held at the start, without mapped files.  Processor seconds are of
this process and of its workers, whose imports count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from specforge_core.config import DataConfig, TargetConfig
from specforge_core.data.files import open_source
from specforge_core.data.order import Order
from specforge_core.data.prompts import open_prompts
from specforge_core.data.stream import Closed
from specforge_core.target.tokenizer import load_tokenizer

TURNS, ASKED, SAID = (1, 3), (15, 120), (80, 500)  # of a conversation; words of a message
BATCH = 64  # rows that are read
SECONDS = 1.0  # between two looks at the memory


def write(path: Path, count: int) -> None:
    """Write conversations of the words of this repository's documents."""
    docs = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    words = " ".join(doc.read_text() for doc in docs).split()
    draw = random.Random(0)

    def text(bounds: tuple[int, int]) -> str:
        size = draw.randint(*bounds)
        start = draw.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    with path.open("w") as file:
        for _ in range(count):
            messages = []
            for _ in range(draw.randint(*TURNS)):
                messages.append({"role": "user", "content": text(ASKED)})
                messages.append({"role": "assistant", "content": text(SAID)})
            file.write(json.dumps({"messages": messages}) + "\n")


def anonymous(pid: int) -> int:
    """Return the bytes of memory that a process and its children have for themselves."""
    found = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        found = 1024 * int(status.split("RssAnon:")[1].split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += sum(anonymous(int(one)) for one in (task / "children").read_text().split())
    except (OSError, IndexError):
        pass  # it ended
    return found


def measure(target: str, path: str, cache: str, workers: int, limit: float) -> None:
    """Print one line: what a training waits for, and no more after `limit` seconds."""
    tokenizer = load_tokenizer(TargetConfig(path=target))
    data = DataConfig(train=(path,), cache=Path(cache), workers=workers)
    memory: list[int] = []  # beyond what there was at the start
    ended = threading.Event()
    base = anonymous(os.getpid())

    def watch() -> None:
        while not ended.wait(SECONDS):
            memory.append(anonymous(os.getpid()) - base)

    threading.Thread(target=watch, daemon=True).start()
    started, before = time.perf_counter(), processor(resource.RUSAGE_SELF)
    asked = open_prompts(data, tokenizer, len(tokenizer), lambda name, _: open_source(name))
    rows = asked.stream()
    order = Order(0, data.shuffle_window, rows.wait, asked.window)
    for place in range(BATCH):
        _ = rows[order.at(place)[1]]
    print(f"first {time.perf_counter() - started:6.1f} s", end=", ", flush=True)
    timer = threading.Timer(limit, rows.stop)
    timer.start()
    try:
        told = f"all {rows.wait():,} rows"
    except Closed:
        told = "stopped"
    seconds = time.perf_counter() - started
    timer.cancel()
    ended.set()
    rows.close()
    memory = memory or [anonymous(os.getpid()) - base]
    shown = [memory[round(part * (len(memory) - 1))] >> 20 for part in (0.25, 0.5, 0.75, 1)]
    used = processor(resource.RUSAGE_SELF) - before
    print(
        f"{told} after {seconds:.1f} s; MiB at each quarter {shown}, at most {max(memory) >> 20};"
    )
    print(f"  processor {used:.1f} s, its workers {processor(resource.RUSAGE_CHILDREN):.1f} s")


def processor(who: int) -> float:
    """Return the processor seconds of this process, or of those that it waited for."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop looking after these")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, cache, workers = options.child
        measure(options.target, path, cache, int(workers), options.seconds)
        return
    path = options.folder / f"conversations-{options.count}.jsonl"
    if not path.exists():
        write(path, options.count)
    print(f"{options.count:,} conversations, {path.stat().st_size >> 20:,} MiB")
    with tempfile.TemporaryDirectory(dir=options.folder) as cache:
        for workers in options.workers:
            for kept in (False, True):
                if not kept:
                    shutil.rmtree(cache)
                print("kept" if kept else f"{workers} workers", end=": ", flush=True)
                again = [sys.executable, __file__, options.target, f"--seconds={options.seconds}"]
                subprocess.run([*again, "--child", str(path), cache, str(workers)], check=True)


if __name__ == "__main__":
    main()
