"""Progress of long work: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two plain lines

console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)  # texts as they are


def tell(line: str) -> None:
    """Print a line that every rank has to say, on the first one."""
    if os.environ.get("RANK", "0") == "0":
        console.print(line)


@dataclass(slots=True)
class Meter:
    """Counts finished units; `note` is shown beside the count."""

    label: str
    total: int | None
    bar: Progress | None
    done: int = 0
    note: str = ""
    before: int = 0  # units of an earlier run
    deadline: float | None = None  # time.monotonic() at which the work ends in any case
    ends: bool = False  # also the first line that says something and the last one are printed
    told: int | None = None  # units done when a line was last printed
    started: float = field(default_factory=time.monotonic)

    def skip(self, units: int) -> None:
        """Count `units` as done by an earlier run; they tell nothing of this one's speed."""
        self.before += units
        self.advance(units)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as done."""
        self.done += units
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=self.note)
        if self.ends and self.told is None and self.note:
            self.tell()

    def tell(self) -> None:
        """Print the plain line."""
        self.told = self.done
        console.print(self.line())

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the speed so far, or None if that is not known."""
        now = time.monotonic()
        until_deadline = None if self.deadline is None else max(0.0, self.deadline - now)
        fresh = self.done - self.before
        if self.total is None or fresh <= 0:
            return until_deadline
        left = (now - self.started) / fresh * max(0, self.total - self.done)
        return left if until_deadline is None else min(left, until_deadline)

    def line(self) -> str:
        """Return the plain line."""
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.label} {self.done}{of}", self.note]
        if (left := self.seconds_left()) is not None:
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(part for part in parts if part)


def _print_lines(tracker: Meter, ended: threading.Event) -> None:
    while not ended.wait(PLAIN_SECONDS):
        tracker.tell()


@contextmanager
def _plain(tracker: Meter) -> Iterator[Meter]:
    """Print a line now and then, from a thread: one unit of work may take long."""
    ended = threading.Event()
    thread = threading.Thread(target=_print_lines, args=(tracker, ended), daemon=True)
    thread.start()
    try:
        yield tracker
    finally:
        ended.set()
        thread.join()
    if tracker.ends and tracker.told not in (None, tracker.done):
        tracker.tell()


@contextmanager
def track(
    label: str, total: int | None, *, quiet: bool = False, ends: bool = False
) -> Iterator[Meter]:
    """Show the progress of one piece of work; `quiet` (other ranks) shows nothing.

    With `ends` also work that is done before a line is due has a first and a last one.
    """
    if quiet:
        yield Meter(label, total, None)
        return
    if not sys.stderr.isatty():
        with _plain(Meter(label, total, None, ends=ends)) as tracker:
            yield tracker
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(label, total=total, note="")
        yield Meter(label, total, bar)
