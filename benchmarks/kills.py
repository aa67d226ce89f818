"""Kill captures and trainings at random moments, start them again, and compare with a quiet run.

python benchmarks/kills.py [--kills 300] [--seed 0] [--kinds capture offline online follow ranks]

Each kind's command runs undisturbed once, then under SIGKILLs after a random part of that time,
up to four a run, until it ends by itself.  Then every sample is there once and byte-equal, weights
and optimizer are equal, so are the lines of metrics.jsonl (but for times), and no other file is
left.  Prints the counts; exits 1 on a difference.  Processes come from a fork server that has
imported torch, so that kills hit the work and not the imports; `ranks` are whole commands, of
which a random process is killed: the launcher or a rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.drafts.checkpoint import find
from specforge_core.testing.runs import lines, write_run
from specforge_core.testing.toy import save_toy_target

KINDS = ("capture", "offline", "online", "follow", "ranks")
WINDOWS = ((1, 3), (4, 3), (3, 5), (7, 4))  # log_every and save_every, by trial
STEPS, CONVERSATIONS, LONGEST = 40, 60, 300.0
CONTEXT = multiprocessing.get_context("forkserver")


def command(arguments: list[str], log: str) -> None:
    """Be `specforge` with these arguments, its output in `log`."""
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["specforge", *arguments]
    from specforge_core.cli import main

    main()


def forked(arguments: list[str], log: Path) -> Any:
    process = CONTEXT.Process(target=command, args=(arguments, str(log)))
    process.start()
    return process


class Ranks:
    """`specforge train --nproc 2` in a process group of its own, as a Process behaves."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        line = [sys.executable, "-m", "specforge_core.cli", *arguments, "--nproc", "2"]
        with log.open("ab") as file:
            self.popen = subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True)

    def join(self, timeout: float) -> None:
        try:
            self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    @property
    def exitcode(self) -> int | None:
        return self.popen.poll()

    def members(self) -> list[int]:
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _session(entry) == self.popen.pid
        ]

    def kill(self) -> None:
        """Kill one of the processes, and wait until the others have noticed."""
        os.kill(random.choice(self.members() or [self.popen.pid]), signal.SIGKILL)
        ends = time.monotonic() + LONGEST
        while self.popen.poll() is None or self.members():
            if time.monotonic() > ends:
                raise SystemExit(f"processes {self.members()} outlive the one that was killed")
            time.sleep(0.1)


def _session(entry: Path) -> int | None:
    """Return the session of a process that runs, None of one that is gone."""
    try:
        after_name = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else int(after_name[3])


# ---- what must be equal ------------------------------------------------------------


def same_capture(one: Path, other: Path) -> list[str]:
    readers = [ShardReader(path, CaptureManifest.read(path)) for path in (one, other)]
    problems = []
    rows = [{r.prompt_index(i): r[i] for i in range(len(r))} for r in readers]
    if any(len(r) != len(found) for r, found in zip(readers, rows, strict=True)):
        problems.append("a sample is there twice")
    if rows[0].keys() != rows[1].keys():
        problems.append(f"{len(rows[0])} and {len(rows[1])} samples")
    for index in rows[0].keys() & rows[1].keys():
        a, b = rows[0][index], rows[1][index]
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            problems.append(f"sample {index} differs")
    manifest = readers[1].manifest
    listed = {shard.file for shard in manifest.shards} | {"manifest.json", ".lock"}
    return problems + _left_over(other, listed | {str(manifest.token_counts)})


def same_run(one: Path, other: Path) -> list[str]:
    problems = []
    stored = []
    for path in (one, other):
        stored.append({})
        for file in sorted(find(path).glob("*.safetensors")):
            # a name occurs in the file of each rank
            stored[-1] |= {(file.name, name): v for name, v in load_file(file).items()}
    if stored[0].keys() != stored[1].keys():
        problems.append("other tensors")
    elif not all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0]):
        problems.append("weights or optimizer differ")
    steady = [
        [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per"))}
            for row in lines(path)
        ]
        for path in (one, other)
    ]
    if steady[0] != steady[1]:
        problems.append("metrics.jsonl differs")
    expected = {str(path.relative_to(one)) for path in one.rglob("*")}
    return problems + _left_over(other, expected)


def _left_over(path: Path, expected: set[str]) -> list[str]:
    found = {str(file.relative_to(path)) for file in path.rglob("*")}
    return [f"left over: {name}" for name in sorted(found - expected)]


# ---- the campaign --------------------------------------------------------------------


class Campaign:
    """One kind of command in a directory of its own."""

    def __init__(self, kind: str, root: Path, target: Path) -> None:
        self.kind, self.root = kind, root
        root.mkdir()
        self.log = root / "log"
        train = {"max_steps": STEPS, "batch_size": 2, "learning_rate": 0.05, "keep": 2}
        self.config = write_run(
            root,
            target,
            conversations=CONVERSATIONS,
            target={"batch_tokens": 256},
            strategy={"name": "linear"},
            train=train,
            capture={"shard_tokens": 400, "window": 4},
        )
        self.seconds: dict[str, float] = {}

    def starters(self, name: str, trial: int) -> list[Callable[[], Any]]:
        """Return what starts each process of a run, for the first time or again."""
        log_every, save_every = WINDOWS[trial % len(WINDOWS)]
        train = ["train", "-c", str(self.config), f"output_dir={self.root / name}"]
        train += [f"train.log_every={log_every}", f"train.save_every={save_every}"]
        stored = self.root / (f"{name}-capture" if self.kind in ("capture", "follow") else "stored")
        capture = ["capture", "-c", str(self.config), f"data.capture_dir={stored}"]
        offline = [*train, f"data.capture_dir={stored}"]
        arguments = {
            "capture": [capture],
            "offline": [offline],
            "online": [train],
            "follow": [capture, [*offline, "data.follow=true"]],
            "ranks": [train],
        }[self.kind]
        start = Ranks if self.kind == "ranks" else forked
        return [partial(start, each, self.log) for each in arguments]

    def quiet(self, trial: int) -> str:
        """Run undisturbed, once for each pair of windows; return the run's name."""
        name = f"quiet{trial % len(WINDOWS)}" if self.kind != "capture" else "quiet"
        if name in self.seconds:
            return name
        if self.kind == "offline" and not self.seconds:
            arguments = ["capture", "-c", str(self.config)]
            stored = forked([*arguments, f"data.capture_dir={self.root / 'stored'}"], self.log)
            self._wait([stored])
        begun = time.monotonic()
        self._wait([start() for start in self.starters(name, trial)])
        self.seconds[name] = time.monotonic() - begun
        return name

    def _wait(self, processes: list[Any]) -> None:
        for process in processes:
            process.join(LONGEST)
            if process.exitcode != 0:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise SystemExit(f"{self.kind}: exit status {process.exitcode}:\n{tail}")

    def trial(self, trial: int, kills: int, draw: random.Random) -> tuple[int, list[str]]:
        """Kill at most `kills` times, let it end, compare; return the kills and what differs."""
        quiet = self.quiet(trial)
        name, killed = f"killed{trial}", 0
        starters = self.starters(name, trial)
        processes = [start() for start in starters]
        while killed < kills:
            victim = draw.randrange(len(processes))
            processes[victim].join(draw.uniform(0.02, 0.9) * self.seconds[quiet])
            if processes[victim].exitcode is not None:
                break
            processes[victim].kill()
            processes[victim].join(LONGEST)
            killed += processes[victim].exitcode != 0
            processes[victim] = starters[victim]()
        self._wait(processes)
        directory, other = self.root / quiet, self.root / name
        problems: list[str] = []
        if self.kind in ("capture", "follow"):
            problems += same_capture(self.root / f"{quiet}-capture", self.root / f"{name}-capture")
            shutil.rmtree(self.root / f"{name}-capture")
        if self.kind != "capture":
            problems += same_run(directory, other)
            shutil.rmtree(other)
        return killed, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="over all kinds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(
        [
            "specforge_core.cli",
            "specforge_core.train.run",
            "specforge_core.capture.job",
            "specforge_linear",
            "transformers.models.llama.modeling_llama",
        ]
    )
    first = CONTEXT.Process(target=int)  # the server starts, and imports, before any is timed
    first.start()
    first.join()
    draw = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    share, rest = divmod(arguments.kills, len(arguments.kinds))
    with tempfile.TemporaryDirectory(prefix="specforge-kills-") as folder:
        save_toy_target(Path(folder) / "target")
        for number, kind in enumerate(arguments.kinds):
            campaign = Campaign(kind, Path(folder) / kind, Path(folder) / "target")
            left, trial, wrong = share + (number < rest), 0, 0
            while left > 0:
                killed, problems = campaign.trial(trial, min(left, 4), draw)
                left, trial, wrong = left - killed, trial + 1, wrong + bool(problems)
                counts["kills"] += killed
                for problem in problems:
                    print(f"{kind}, trial {trial}: {problem}", flush=True)
            kills = share + (number < rest) - left
            print(f"{kind}: {kills} kills in {trial} runs, {wrong} not as undisturbed", flush=True)
            counts["runs"] += trial
            counts["wrong"] += wrong
    print(f"all: {counts['kills']} kills in {counts['runs']} runs, {counts['wrong']} wrong")
    raise SystemExit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
