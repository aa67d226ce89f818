"""One run at a time in an output directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from ..locks import hold

LOCK = ".lock"


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` until the block, or the process, ends.

    A block that writes nothing there leaves nothing, nor the directory if it was not there.
    Raises ConfigError when the directory cannot be written or another run holds it.
    """
    path = output_dir / LOCK
    there = output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as exc:
        raise ConfigError(
            f"output_dir {str(output_dir)!r} cannot be written: {exc.strerror}. Try: output_dir=DIR"
        ) from exc
    with lock:
        if not hold(lock):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ConfigError(
                f"another run (process {holder}) is training in {str(output_dir)!r}. Wait for "
                f"it, end it with `kill {holder}`, or try: output_dir=DIR"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            if list(output_dir.iterdir()) == [path]:
                path.unlink()
                if not there:
                    output_dir.rmdir()
