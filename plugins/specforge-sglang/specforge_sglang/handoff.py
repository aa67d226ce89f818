"""The reader's end of a hand-off: where frames arrive, and how one waits for them.

A frame that nobody waits for any more is overwritten or thrown away when it arrives.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import numpy as np
from specforge_sglang_capture import spool
from specforge_sglang_capture.ask import Way

from specforge_core.errors import ConfigError


class Handoff(Protocol):
    """Where frames arrive, by name."""

    way: Way

    @property
    def place(self) -> str:
        """What a request's id says about where its states go."""
        ...

    def expect(self, name: str, most: int) -> None:
        """Wait for a frame of at most `most` bytes."""
        ...

    def take(self, name: str, timeout: float) -> Any:
        """Return the bytes of a frame, writable; None when it did not come in time."""
        ...

    def forget(self, name: str) -> None: ...
    def close(self) -> None: ...


class FileHandoff:
    """Files in a directory of this process's own, mapped as long as what was read is used.

    Then a file is free to be written again; the mapping stays, so that neither side waits for
    new memory.  Files of at most `keep` bytes together are kept.
    """

    way: Way = "files"

    def __init__(self, root: Path | None = None, keep: int = 1 << 30) -> None:
        self.root = root or spool.default_root()
        try:
            spool.sweep(self.root)
            self.path, self._lock = spool.make(self.root)
        except OSError as exc:
            raise ConfigError(
                f"no hand-off directory can be made in {self.root}: {exc.strerror}. "
                "Try: target.options.directory=DIRECTORY, on a tmpfs"
            ) from exc
        self._keep = keep
        self._maps: dict[int, mmap.mmap] = {}  # by inode, which a mapping keeps from being reused
        self._forgotten: set[str] = set()

    @property
    def place(self) -> str:
        return self.path.name

    def free_bytes(self) -> int:
        """Return how much the file system can still hold, files that are used again included."""
        return shutil.disk_usage(self.root).free + sum(spool.free_files(self.path).values())

    def expect(self, name: str, most: int = 0) -> None:
        """Free what came too late for anyone."""
        for late in list(self._forgotten):
            if spool.free(self.path / late):
                self._forgotten.discard(late)

    def take(self, name: str, timeout: float) -> Any:
        """Return the file called `name`, mapped; None when it did not come in time.

        The bytes may be followed by others.  Once the array and all that shares its memory
        are gone, they are written over.
        """
        path, pause = self.path / name, 0.0005
        give_up = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > give_up:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.004)
        with path.open("r+b") as file:
            found = os.fstat(file.fileno())
            mapped = self._maps.get(found.st_ino)
            if mapped is None or len(mapped) < found.st_size:
                mapped = self._maps[found.st_ino] = mmap.mmap(file.fileno(), 0)
        held = self.path / f".held-{found.st_ino}"
        path.rename(held)
        array = np.frombuffer(mapped, dtype=np.uint8)
        finalize(array, self._release, held, found.st_ino).atexit = False
        return array

    def _release(self, held: Path, inode: int) -> None:
        """Let a file be written again.  Called wherever its last user ends: it takes no lock."""
        if sum(map(len, self._maps.copy().values())) <= self._keep:
            spool.free(held)
            return
        held.unlink(missing_ok=True)
        self._maps.pop(inode, None)

    def forget(self, name: str) -> None:
        """Say that nobody waits for `name` any more."""
        if not spool.free(self.path / name):
            self._forgotten.add(name)

    def close(self) -> None:
        """Delete the directory; writers see that it has no reader any more."""
        # Under another name first, so that nobody begins to do anything to a file in it: writers,
        # or this process's last users of an array.  What they are in the middle of ends at once,
        # but it may leave a file behind the first try's back.
        gone = self.path.with_name(f"{self.path.name}.closed")
        with contextlib.suppress(OSError):
            self.path.rename(gone)
        for _ in range(100):
            shutil.rmtree(gone, ignore_errors=True)
            if not gone.exists():
                break
            time.sleep(0.001)
        os.close(self._lock)
