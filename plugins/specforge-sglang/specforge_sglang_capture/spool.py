"""Hand-off directories: who owns one, which are left over, and which files can be used again.

The reader makes a directory and holds a lock in it as long as it lives.  The kernel frees the
lock however the reader ends, so a directory whose lock can be taken has no reader any more, and
its user's other processes may delete it.  What the lock says tells such a directory from others of
a like name.  Another user's is none: a link may lie there in the place of a frame.

A file that was read is not deleted but called `free-SIZE-NUMBER`, and a writer takes it by
renaming it: filling memory that is there already is several times as fast as new memory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "specforge-"
LOCK = "lock"
FREE = "free-"
MARK = b"a hand-off directory of specforge-sglang, which may be deleted once this is not locked\n"
OURS = re.compile(rf"{PREFIX}\d+-[a-z0-9_]+(\.closed)?")


def default_root() -> Path:
    """Return where hand-off directories are: in memory, where there is a tmpfs."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def make(root: Path) -> tuple[Path, int]:
    """Make a directory that this process owns; return it and its lock's file descriptor."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(hidden / LOCK, flags, 0o600)
    os.write(descriptor, MARK)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # only under this name may others look at the lock
    path = root / f"{PREFIX}{os.getpid()}-{hidden.name.rsplit('-', 1)[1]}"
    hidden.rename(path)
    return path, descriptor


def _lock(path: Path) -> int | None:
    """Open the lock of a hand-off directory of this user; None where `path` is none, or a link."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(directory).st_uid != os.geteuid():
            return None
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nor wait for a pipe
        descriptor = os.open(LOCK, flags, dir_fd=directory)
    except OSError:
        return None
    finally:
        os.close(directory)
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if regular and os.pread(descriptor, len(MARK) + 1, 0) == MARK:
        return descriptor
    os.close(descriptor)
    return None


def _is_held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def has_reader(path: Path) -> bool:
    """Say whether `path` is a hand-off directory whose owner still lives."""
    if (descriptor := _lock(path)) is None:
        return False
    try:
        return _is_held(descriptor)
    finally:
        os.close(descriptor)


def sweep(root: Path) -> list[Path]:
    """Delete the hand-off directories whose owners are gone; return them."""
    gone = []
    for path in root.glob(f"{PREFIX}*"):
        if not OURS.fullmatch(path.name) or (descriptor := _lock(path)) is None:
            continue
        try:
            if not _is_held(descriptor):
                shutil.rmtree(path)
                gone.append(path)
        except OSError:  # another user's, or swept by another process at this moment
            continue
        finally:
            os.close(descriptor)
    return gone


def free(path: Path) -> bool:
    """Let a writer have a file, whatever is in it; False when there is none."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):  # a link that somebody put there
            path.unlink()
            return False
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
