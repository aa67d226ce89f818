"""Kill captures and trainings at random moments, start them again, and compare with a quiet run.

python benchmarks/kills.py [--kills 300] [--jobs 16] [--seed 0] [--minutes 60] [--kinds KIND ...]

Each kind's command runs undisturbed once, then under SIGKILLs after a random part of that time,
up to four a run, until it ends by itself.  Then every sample is there once and byte-equal, weights
and optimizer are equal, so are the lines of metrics.jsonl (but for times), and no other file is
left.  Prints a table; exits 1 on a difference, and when the kills were not done in time.  Processes
come from a fork server that has imported torch, so that kills hit the work and not the imports.  Of
`ranks` a random process is killed: the launcher or one of its two.  With `--jobs` parts of the
campaign run side by side, each in a directory of its own.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kills_compare import same_capture, same_run

from specforge_core.testing.forked import cli
from specforge_core.testing.runs import write_run
from specforge_core.testing.toy import save_toy_target

KINDS = ("capture", "offline", "online", "follow", "ranks")
WINDOWS = ((1, 3), (4, 3), (3, 5), (7, 4))  # log_every and save_every, by trial
STEPS, CONVERSATIONS = 24, 40
LONGEST = 180.0  # seconds of one process, on a busy machine
EACH = 4  # kills of one run, at most
PART = 3 * EACH  # kills of one part of the campaign


class Command:
    """`specforge` with some arguments, in processes that a server forks."""

    def __init__(self, arguments: list[str], ranks: int = 1) -> None:
        self.draw = random.Random(" ".join(arguments))
        self.ranks = ranks
        self.process = cli(*arguments, *(["--nproc", str(ranks)] if ranks > 1 else []))

    def join(self, timeout: float) -> int | None:
        """Wait for its end; return the exit status, None after `timeout` seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout)
        return None

    def kill(self) -> None:
        """Kill it, or one of its ranks, and wait until the others have noticed."""
        members = [self.process.pid]
        if self.ranks > 1:
            members += self._hold()
        with suppress(ProcessLookupError):
            os.kill(self.draw.choice(members), signal.SIGKILL)
        self.process.send_signal(signal.SIGCONT)
        ends = time.monotonic() + LONGEST
        while self.process.poll() is None or any(map(runs, members)):
            if time.monotonic() > ends:
                raise SystemExit(f"processes {members} outlive the one that was killed")
            time.sleep(0.02)

    def _hold(self) -> list[int]:
        """Stop the launcher, which then starts no more ranks, and return those that there are."""
        self.process.send_signal(signal.SIGSTOP)
        while state(self.process.pid) not in ("T", "Z", ""):
            time.sleep(0.001)
        with suppress(OSError):  # it ended just now
            task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            return [*map(int, task.read_text().split())]
        return []


def runs(process: int) -> bool:
    """Say whether a process runs; one that nobody has waited for yet does not."""
    return state(process) not in ("Z", "")


def state(process: int) -> str:
    """Return the letter by which the kernel tells what a process does; of none, nothing."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


class Campaign:
    """One kind of command in a directory of its own."""

    def __init__(self, kind: str, root: Path, target: Path) -> None:
        self.kind, self.root = kind, root
        root.mkdir()
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

    def starters(self, name: str, trial: int) -> list[Callable[[], Command]]:
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
        ranks = 2 if self.kind == "ranks" else 1
        return [partial(Command, each, ranks) for each in arguments]

    def quiet(self, trial: int) -> str:
        """Run undisturbed, once for each pair of windows; return the run's name."""
        name = f"quiet{trial % len(WINDOWS)}" if self.kind != "capture" else "quiet"
        if name in self.seconds:
            return name
        if self.kind == "offline" and not self.seconds:
            arguments = ["capture", "-c", str(self.config)]
            self._wait([Command([*arguments, f"data.capture_dir={self.root / 'stored'}"])])
        begun = time.monotonic()
        self._wait([start() for start in self.starters(name, trial)])
        self.seconds[name] = time.monotonic() - begun
        return name

    def _wait(self, commands: list[Command]) -> None:
        for command in commands:
            if (status := command.join(LONGEST)) != 0:
                told = "" if status is None else command.process.communicate()[1][-2000:]
                raise SystemExit(f"{self.kind}: exit status {status}:\n{told}")

    def trial(self, trial: int, kills: int, draw: random.Random) -> tuple[int, list[str]]:
        """Kill at most `kills` times, let it end, compare; return the kills and what differs."""
        quiet = self.quiet(trial)
        name, killed = f"killed{trial}", 0
        starters = self.starters(name, trial)
        processes = [start() for start in starters]
        while killed < kills:
            victim = draw.randrange(len(processes))
            if processes[victim].join(draw.uniform(0.02, 0.9) * self.seconds[quiet]) is not None:
                break
            processes[victim].kill()
            killed += processes[victim].process.returncode != 0
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


@dataclass
class Part:
    """Some kills of one kind, and what became of them."""

    kind: str
    asked: int
    seed: str
    kills: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)
    wrong: int = 0  # runs with a problem


def parts(kinds: list[str], kills: int, seed: int) -> Iterator[Part]:
    """Share out the kills, in parts that a process can do alone."""
    share, rest = divmod(kills, len(kinds))
    for number, kind in enumerate(kinds):
        left = share + (number < rest)
        for place in range(0, left, PART):
            yield Part(kind, min(PART, left - place), f"{seed}/{kind}/{place}")


def work(part: Part, folder: Path, ends: float) -> Part:
    """Do one part of the campaign, in the time there is."""
    root = folder / part.seed.replace("/", "-")
    campaign = Campaign(part.kind, root, folder / "target")
    draw = random.Random(part.seed)
    # a run may end before it is killed; not every time
    while part.kills < part.asked and part.runs < 3 * part.asked and time.time() < ends:
        killed, problems = campaign.trial(part.runs, min(part.asked - part.kills, EACH), draw)
        part.kills, part.runs = part.kills + killed, part.runs + 1
        part.problems += [f"{part.seed}, run {part.runs}: {problem}" for problem in problems]
        part.wrong += bool(problems)
    shutil.rmtree(root)
    return part


def campaign(arguments: argparse.Namespace, folder: Path) -> list[Part]:
    """Do all parts, `arguments.jobs` of them at a time; say what differs at once."""
    ends = time.time() + 60 * arguments.minutes
    done: list[Part] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        asked = list(parts(arguments.kinds, arguments.kills, arguments.seed))
        asked.sort(key=lambda part: part.kind != "ranks")  # whole commands take longest
        for future in as_completed([pool.submit(work, part, folder, ends) for part in asked]):
            done.append(future.result())
            for problem in done[-1].problems:
                print(problem, flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="over all kinds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=1, help="parts that run side by side")
    parser.add_argument("--minutes", type=float, default=60.0, help="until no run is begun")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cli("--version").wait()  # the server starts, and imports, before any is timed
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="specforge-kills-") as folder:
        save_toy_target(Path(folder) / "target")
        done = campaign(arguments, Path(folder))
    print("| campaign | kills | runs compared | not as undisturbed |\n| --- | --- | --- | --- |")
    for kind in (*arguments.kinds, "all"):
        chosen = [part for part in done if kind in (part.kind, "all")]
        kills, runs, wrong = (
            sum(getattr(part, name) for part in chosen) for name in ("kills", "runs", "wrong")
        )
        print(f"| {kind} | {kills} | {runs} | {wrong} |")
    print(f"in {time.monotonic() - begun:.0f} s, {arguments.jobs} side by side")
    if kills < arguments.kills:
        print(f"only {kills} of {arguments.kills} kills were done in {arguments.minutes:g} minutes")
    raise SystemExit(wrong > 0 or kills < arguments.kills)


if __name__ == "__main__":
    main()
