"""Run `specforge` commands several at a time, each in a fork of this process.

A fork has torch and transformers imported already, which takes a new process 5 to 8 s.  This
process itself computes nothing and never touches a GPU, so that its forks can.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")
END_SECONDS = 30.0  # that a job has to save and end when this process is stopped
LAST = 600  # characters of a log that a failure shows


@dataclass(frozen=True)
class Job:
    """Something to be done once: `done` says that it was, and with what."""

    name: str  # stage/method
    arguments: tuple[str, ...]  # of `specforge`, or of `work`
    log: Path
    done: Path
    work: Callable[..., None] | None = None  # instead of a command
    made_of: str = ""  # tells apart what the same arguments name

    def is_done(self) -> bool:
        """Say whether it was done with these arguments, and what they name."""
        return self.done.exists() and (
            note(self.done)["arguments"],
            note(self.done)["made_of"],
        ) == (list(self.arguments), self.made_of)


def note(path: Path) -> dict[str, Any]:
    """Return what was noted of a job that was done."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_jobs(jobs: Sequence[Job], at_once: int, gpus: Sequence[str]) -> list[str]:
    """Run jobs, `at_once` at a time, over `gpus` in turn; return the names of those that failed.

    One that was done before with the same arguments is not run again.
    """
    failed: list[str] = []
    running: dict[int, tuple[Job, Any, float, int]] = {}  # by sentinel
    left = [job for job in jobs if not job.is_done()]
    side_by_side = min(at_once, len(left))
    try:
        while left or running:
            while left and len(running) < at_once:
                job, used = left.pop(0), [place for *_, place in running.values()]
                place = min(range(len(gpus) or 1), key=used.count)
                process = FORK.Process(target=_be, args=(job, gpus[place] if gpus else None))
                print(f"   {job.name}: {' '.join(job.arguments[:1])} ...", flush=True)
                process.start()
                running[process.sentinel] = (job, process, time.monotonic(), place)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                job, process, began, _ = running.pop(sentinel)
                process.join()
                seconds = time.monotonic() - began
                if process.exitcode:
                    failed.append(job.name)
                    text = job.log.read_text(encoding="utf-8", errors="replace")[-LAST:]
                    print(f"   {job.name} FAILED after {seconds:.0f} s, see {job.log}:\n{text}")
                    continue
                _write_note(job, seconds, side_by_side)
                print(f"   {job.name}: {seconds:.0f} s", flush=True)
    finally:  # of an interrupted call
        _end([process for _, process, _, _ in running.values()])
    return failed


def _write_note(job: Job, seconds: float, at_once: int) -> None:
    told = {
        "arguments": job.arguments,
        "made_of": job.made_of,
        "seconds": round(seconds, 1),
        "at_once": at_once,
    }
    job.done.parent.mkdir(parents=True, exist_ok=True)
    beside = job.done.with_suffix(".tmp")
    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    beside.replace(job.done)


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()  # a training saves
    give_up = time.monotonic() + END_SECONDS
    for process in processes:
        process.join(max(0.0, give_up - time.monotonic()))
        process.kill()


def _be(job: Job, gpu: str | None) -> None:
    """In the fork: be the command, with its output in its log, and end as it does."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    status = 1
    try:
        print(f"$ specforge {shlex.join(job.arguments)}", flush=True)
        if job.work is not None:
            job.work(*job.arguments)
        else:
            from specforge_core.cli import main

            sys.argv = ["specforge", *job.arguments]
            main()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # with threads that torch may have, nothing is torn down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
