"""One run at a time in an output directory, and whether one is there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from . import stop
from .documents import open_regular
from .errors import ConfigError
from .files import append, make_folder, open_own, refusing, sweep
from .locks import hold, is_at, release
from .progress import console
from .text import cut

LOCK, METRICS = ".lock", "metrics.jsonl"  # of an output directory
CHECKPOINTS = "checkpoints"
FILES, FOLDERS = (LOCK, METRICS), (CHECKPOINTS,)
LATEST, BEST = "latest", "best"  # links to checkpoints, made behind the first one
SHOWN = 3  # names of others' files
LOOKS, LOOK_SECONDS = 500, 0.01  # who only looks for a run shares the lock for microseconds


def running(output_dir: Path) -> bool:
    """Say whether a run holds `output_dir` at this moment; of this or another process."""
    try:
        number = open_regular(output_dir / LOCK)
    except OSError:
        return False
    with os.fdopen(number, "rb") as lock:
        return not hold(lock, shared=True)  # two that look do not see each other


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` until the block, or the process, ends.

    A block that writes nothing there leaves nothing, nor the directory if it was not there.
    Raises ConfigError when the directory cannot be written, something else has the name of what
    a run keeps in it, or another run holds it; and Interrupted if the command was asked to end.
    Says when there are files of others.
    """
    stop.check()
    path = output_dir / LOCK
    with refusing(ConfigError, "Try: output_dir=DIR", output_dir):
        _check_kinds(output_dir)
        others = _others(output_dir)
        lock, there = _taken(output_dir)
    with lock:
        try:
            with refusing(ConfigError, "Make room there, or try: output_dir=DIR", output_dir):
                append(lock, str(os.getpid()).encode(), 0, sync=False)
            if others:
                console.print(others)
            for folder in (output_dir, output_dir / CHECKPOINTS):
                sweep(folder)
            yield
        finally:
            if list(output_dir.iterdir()) == [path]:
                path.unlink()
                if not there:
                    with suppress(OSError):  # another run begins in it
                        output_dir.rmdir()


def _check_kinds(output_dir: Path) -> None:
    """Raise ConfigError where something else has the name of a file or folder of a run's."""
    for names, right, kind in ((FILES, Path.is_file, "file"), (FOLDERS, Path.is_dir, "folder")):
        for found in (output_dir / name for name in names):
            if found.exists() and not right(found):
                raise ConfigError(
                    f"{found} is no {kind}, and a run keeps one there. Move it away, or try: "
                    "output_dir=DIR"
                )


def _others(output_dir: Path) -> str | None:
    """Return a line about what lies in a directory that is no run's yet.

    Raises ConfigError where that is in the place of what a run writes, and removes.
    """
    if not output_dir.is_dir() or any(output_dir.glob(f"{CHECKPOINTS}/step-*/state.json")):
        return None
    try:
        names = sorted(path.name for path in output_dir.iterdir() if path.name != LOCK)
    except FileNotFoundError:  # of a run that has just ended and leaves nothing
        return None
    if (output_dir / LOCK).exists():  # a run's that was killed before its first checkpoint, or ...
        _check_lost(output_dir)
        theirs = METRICS in names or CHECKPOINTS in names
        return told_of_others(output_dir, names, "run") if names and not theirs else None
    for name in (METRICS, CHECKPOINTS):
        path = output_dir / name
        if path.exists() and (path.stat().st_size if path.is_file() else any(path.iterdir())):
            raise ConfigError(
                f"{path} is of no run that can go on: no checkpoint of one is there, and what is "
                "would be replaced. Move it away, or try: output_dir=DIR"
            )
    return told_of_others(output_dir, names, "run") if names else None


def _check_lost(output_dir: Path) -> None:
    """Raise ConfigError where a run had a checkpoint, as its links say, and none is there now."""
    for place in (output_dir / name for name in (LATEST, BEST)):
        if place.is_symlink():
            raise ConfigError(
                f"{place} leads to {place.readlink()}, and no checkpoint is there: the run would "
                f"begin anew and replace {METRICS}. Put its checkpoints back, or to begin anew "
                f"remove {output_dir}, or try: output_dir=DIR"
            )


def told_of_others(folder: Path, names: list[str], writer: str) -> str:
    """Return a line about the files of others in a folder that a run, or another, writes into."""
    shown = ", ".join(map(cut, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} is not empty ({shown}{more}): what the {writer} writes comes beside that"


def _taken(output_dir: Path) -> tuple[BinaryIO, bool]:
    """Return the file whose lock is taken, and whether its directory was there before.

    A run that ends and has written nothing removes both, maybe after this one has opened the file:
    then they are made again.
    """
    path, looks = output_dir / LOCK, 0
    while True:
        there, looks = output_dir.exists(), looks + 1
        try:
            make_folder(output_dir)
            lock = open_own(path)
        except FileNotFoundError:
            if looks == LOOKS:
                raise
            continue
        if not _take(lock):
            with lock:
                lock.seek(0)
                holder = lock.read().decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"another run (process {holder}) is training in {str(output_dir)!r}. Wait for "
                f"it, end it with `kill {holder}`, or try: output_dir=DIR"
            )
        if looks == LOOKS or is_at(lock.fileno(), path):
            return lock, there
        lock.close()


def _take(lock: IO[bytes]) -> bool:
    """Take the lock of a run; False if another run has it."""
    for _ in range(LOOKS):
        if hold(lock):
            return True
        if not hold(lock, shared=True):  # a run has it for itself
            return False
        release(lock)
        time.sleep(LOOK_SECONDS)
    return False
