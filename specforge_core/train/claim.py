"""One run at a time in an output directory, and no rank without its launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from ..files import append, make_folder, open_own, refusing, sweep
from ..locks import hold

LOCK = ".lock"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ORPHANED = signal.SIGUSR1  # may come twice: one for each thread of a parent that dies


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` until the block, or the process, ends.

    A block that writes nothing there leaves nothing, nor the directory if it was not there.
    Raises ConfigError when the directory cannot be written or another run holds it.
    """
    path = output_dir / LOCK
    there = output_dir.exists()
    with refusing(ConfigError, "Try: output_dir=DIR", output_dir):
        make_folder(output_dir)
        lock = open_own(path)
    with lock:
        if not hold(lock):
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"another run (process {holder}) is training in {str(output_dir)!r}. Wait for "
                f"it, end it with `kill {holder}`, or try: output_dir=DIR"
            )
        try:
            with refusing(ConfigError, "Make room there, or try: output_dir=DIR", output_dir):
                append(lock, str(os.getpid()).encode(), 0, sync=False)
            for folder in (output_dir, output_dir / "checkpoints"):
                sweep(folder)
            yield
        finally:
            if list(output_dir.iterdir()) == [path]:
                path.unlink()
                if not there:
                    output_dir.rmdir()


def end_with_launcher() -> None:
    """Have the kernel end this rank, after its step, when torch's launcher is killed.

    The launcher hands on the signals it can catch; kill -9 it cannot.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)
