"""Hand-off directories: who owns one, which are left over, and which files can be used again.

The reader makes a directory and holds a lock in it as long as it lives.  The kernel frees the
lock however the reader ends, so a directory whose lock can be taken has no reader any more,
and anyone may delete it.

A file that was read is not deleted but called `free-SIZE-NUMBER`, and a writer takes it by
renaming it: filling memory that is there already is several times as fast as new memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "specforge-"
LOCK = "lock"
FREE = "free-"


def default_root() -> Path:
    """Return where hand-off directories are: in memory, where there is a tmpfs."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def make(root: Path) -> tuple[Path, int]:
    """Make a directory that this process owns; return it and its lock's file descriptor."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
    descriptor = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # only under this name may others look at the lock
    path = root / f"{PREFIX}{os.getpid()}-{hidden.name.rsplit('-', 1)[1]}"
    hidden.rename(path)
    return path, descriptor


def has_reader(path: Path) -> bool:
    """Say whether the owner of a hand-off directory still lives."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def sweep(root: Path) -> list[Path]:
    """Delete the hand-off directories whose owners are gone; return them."""
    gone = []
    for path in root.glob(f"{PREFIX}*"):
        try:
            if (path / LOCK).exists() and not has_reader(path):
                shutil.rmtree(path)
                gone.append(path)
        except OSError:  # another user's, or swept by another process at this moment
            continue
    return gone


def free(path: Path) -> bool:
    """Let a writer have a file, whatever is in it; False when there is none."""
    try:
        found = path.stat()
        path.rename(path.with_name(f"{FREE}{found.st_size}-{found.st_ino}"))
    except FileNotFoundError:
        return False
    return True


def free_files(directory: Path) -> dict[Path, int]:
    """Return the files that can be written again, and their sizes; others may take them."""
    return {found: int(found.name.split("-")[1]) for found in directory.glob(f"{FREE}*")}


def claim(directory: Path, path: Path, size: int) -> None:
    """Call a free file `path`, if there is one: the smallest of `size` bytes, else the largest."""
    sizes = free_files(directory)
    for found in sorted(sizes, key=lambda found: (sizes[found] < size, abs(sizes[found] - size))):
        try:
            found.rename(path)
            return
        except FileNotFoundError:  # another writer has it
            continue
