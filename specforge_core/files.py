"""Files that appear whole under their name or not at all, and what is said when they cannot.

What is written has a hidden, unpredictable name beside its place, is opened so that nothing that
lies there is followed or reused, and is locked while its writer lives: what a killed process left
is told from what another one is writing, and removed by the next start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from .locks import hold_new
from .unwritten import (
    CANNOT_WRITE as CANNOT_WRITE,
    cannot_write as cannot_write,
    refusing as refusing,
    remedied as remedied,
    system_error as system_error,
)

TEMPORARY = re.compile(r"\..*\.specforge-[0-9a-f]{16}\.tmp", re.DOTALL)
NAME_BYTES = 200  # of the name it is for: file systems allow 255 in all
UNLOCKED_SECONDS = 24 * 3600  # where nothing can be locked, what is older is nobody's any more
# what no folder can do anything about; every other error of fsync on one counts
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def temporary(path: Path) -> Path:
    """Return a name beside `path` that nobody can guess, and `sweep` knows."""
    name = os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])
    return path.with_name(f".{name}.specforge-{os.urandom(8).hex()}.tmp")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place when the block ends without an error.

    With `sync` it is on the disk then, and so is its name.  A symbolic link at `path` is
    replaced, not followed.  Raises OSError that names `path`.
    """
    beside = temporary(path)
    try:
        with _create(beside) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            beside.replace(path)
        if sync:
            sync_folder(path.parent)
    except BaseException as exc:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(exc, OSError) and exc.filename in (None, str(beside)):
            raise OSError(exc.errno, exc.strerror, str(path)) from exc
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace a file: the old or the new one is there, never half of one.  Raises OSError."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path`, to be filled and given to `publish`; gone when the block ends.

    Raises OSError that names `path`.
    """
    beside = temporary(path)
    try:
        make_folder(path.parent)
        held = hold_new(beside, lambda: _make(beside))
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    try:
        yield beside
    except OSError as exc:
        if str(exc.filename).startswith(str(beside)):
            raise OSError(exc.errno, exc.strerror, str(path)) from exc
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        os.close(held)


def publish(beside: Path, path: Path) -> None:
    """Rename a finished folder to `path`; then it is on the disk.

    All that lies in it was synced by its writer.  A folder that was at `path` changes places
    with it, so that at any moment there is one; where the kernel cannot do that, it leaves first.
    """
    sync_folder(beside)
    there = path.is_dir() and not path.is_symlink()
    if not (there and _exchange(beside, path)):
        if there:
            remove_folder(path)
        beside.rename(path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is whole or has another name while that goes on.  Raises OSError."""
    gone = temporary(path)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # what stays is swept later


def append(file: BinaryIO, data: bytes, size: int, *, sync: bool = True) -> None:
    """Write `data` behind the first `size` bytes of an unbuffered file, all of it or nothing.

    With `sync`, returns when the disk has it.  Raises OSError, with the file as it was.
    """
    try:
        file.truncate(size)
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        if sync:
            os.fsync(file.fileno())
    except OSError as exc:
        with suppress(OSError):
            file.truncate(size)
        raise OSError(exc.errno, exc.strerror, file.name) from exc


def open_own(path: Path) -> BinaryIO:
    """Open a file of ours to read and add to, new or not; a link there is an error, an OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "a+b", buffering=0)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, on the disk too.  Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), exc.filename) from exc
    for folder in missing:
        sync_folder(folder.parent)


def prepare_folder(path: Path) -> None:
    """Make a folder, and see that files can be made in it, before the work whose end they are.

    What killed processes left there is removed.  Raises OSError.
    """
    make_folder(path)
    sweep(path)
    probe = temporary(path / "probe")
    try:
        _create(probe).close()
        probe.unlink()
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc


def sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's names, where the file system knows how."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as exc:
        if exc.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(number)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder.

    Only what `temporary` named, this user owns and no living process holds.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if TEMPORARY.fullmatch(path.name):
                with suppress(OSError):
                    _remove_left(path)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names; ValueError when it is not in its folder."""
    path = folder / name
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in {folder}")
    # realpath takes a link to itself as it is, and opening it says what is wrong
    if path.is_symlink() and not _real(path).is_relative_to(_real(folder)):
        raise ValueError(f"{path} is a link to a file outside of {folder}")
    return path


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names at one moment; False where that cannot be done."""
    import ctypes  # of no use to a command that only starts

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    result: int = renameat2(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )
    return result == 0


def _create(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(hold_new(path, lambda: os.open(path, flags, 0o666)), "wb")


def _make(folder: Path) -> int:
    folder.mkdir()
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_left(path: Path) -> None:
    if path.is_symlink():  # of a moment, and nothing in it
        if path.lstat().st_uid == os.geteuid():
            path.unlink()
        return
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(number)
        if found.st_uid != os.geteuid():
            return
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # nothing can be locked here
            if time.time() - found.st_mtime < UNLOCKED_SECONDS:
                return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(number)
