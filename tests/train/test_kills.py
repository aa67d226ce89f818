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
    command = [sys.executable, str(SCRIPT), "--kills", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kinds = dict(re.findall(r"^(\w+): (\d+) kills", done.stdout, re.MULTILINE))
    assert kinds.pop("all") == "40"
    assert kinds == dict.fromkeys(("capture", "offline", "online", "follow", "ranks"), "8")
    assert ", 0 wrong" in done.stdout.splitlines()[-1]
