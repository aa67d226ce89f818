"""Whether processes that a test does not wait for have ended."""

from __future__ import annotations

import time
from pathlib import Path


def gone(process: int, seconds: float = 20.0) -> bool:
    """Wait until a process has ended; one that nobody has waited for has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it went before the file was opened, or while it was read
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
