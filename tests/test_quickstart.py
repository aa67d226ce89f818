"""The quickstart in a shortened form: real target, real prompts, every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_short_quickstart_writes_its_report_and_is_lossless(tmp_path: Path) -> None:
    script = str(ROOT / "examples/quickstart/quickstart.py")
    command = [sys.executable, script, "--short", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["lossless"] is True
    assert set(report["per_set"]) == {"gsm", "humaneval", "mt_bench"}
    assert report["acceptance_length"] >= 1.0
    assert report["train_tokens"] > 0
    assert report["train_seconds"] > 0
    for name in ("acceptance.png", "loss.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "export" / "config.json").exists()


def test_no_heldout_prompt_was_trained_on() -> None:
    def questions(path: Path) -> set[str]:
        rows = (json.loads(line) for line in path.read_text().splitlines())
        return {row["messages"][0]["content"] for row in rows}

    here = ROOT / "examples/quickstart"
    trained = questions(here / "train.jsonl")
    for path in sorted((here / "heldout").glob("*.jsonl")):
        assert not trained & questions(path), path
