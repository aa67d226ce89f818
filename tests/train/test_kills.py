"""Captures and trainings that are killed at random moments end as undisturbed ones do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_forty_kills_lose_double_and_change_nothing() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "40", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = re.findall(r"^\| (\w+) \| (\d+) \| \d+ \| (\d+) \|$", done.stdout, re.MULTILINE)
    kinds = {kind: (kills, wrong) for kind, kills, wrong in rows}
    assert kinds.pop("all") == ("40", "0")
    assert kinds == dict.fromkeys(("capture", "offline", "online", "follow", "ranks"), ("8", "0"))
