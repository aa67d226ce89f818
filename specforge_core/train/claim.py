"""One run at a time in an output directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from ..files import append, make_folder, open_own, refusing, sweep
from ..locks import hold
from .metrics import METRICS

LOCK = ".lock"
FILES, FOLDERS = (LOCK, METRICS), ("checkpoints",)


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` until the block, or the process, ends.

    A block that writes nothing there leaves nothing, nor the directory if it was not there.
    Raises ConfigError when the directory cannot be written, something else has the name of what
    a run keeps in it, or another run holds it.
    """
    path = output_dir / LOCK
    for names, right, kind in ((FILES, Path.is_file, "file"), (FOLDERS, Path.is_dir, "folder")):
        for found in (output_dir / name for name in names):
            if found.exists() and not right(found):
                raise ConfigError(
                    f"{found} is no {kind}, and a run keeps one there. Move it away, or try: "
                    "output_dir=DIR"
                )
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
