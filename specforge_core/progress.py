"""Progress of long work: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # between two plain lines

console = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass(slots=True)
class Tracker:
    """Counts finished units; `note` is shown beside the count."""

    label: str
    total: int | None
    bar: Progress | None
    done: int = 0
    note: str = ""
    last_line: float = field(default_factory=time.monotonic)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as done."""
        self.done += units
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=self.note)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            of = f"/{self.total}" if self.total is not None else ""
            console.print(f"{self.label} {self.done}{of} {self.note}".rstrip(), markup=False)


@contextmanager
def track(label: str, total: int | None, *, quiet: bool = False) -> Iterator[Tracker]:
    """Show the progress of one piece of work; `quiet` (other ranks) shows nothing."""
    if quiet or not sys.stderr.isatty():
        tracker = Tracker(label, total, None)
        if quiet:
            tracker.last_line = float("inf")
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
        yield Tracker(label, total, bar)
