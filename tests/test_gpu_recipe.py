"""The recipe that compares two methods gives both the same data, and reports what is there."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specforge_core.load import load_config

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples/recipes/smollm2_gpu"
DRAFTS = ("dflash", "eagle3")


def test_both_drafts_get_the_same_treatment() -> None:
    for name in DRAFTS:
        pytest.importorskip(f"specforge_{name}", reason=f"specforge-{name} is not installed")
    dflash, eagle3 = (load_config(RECIPE / f"run_{name}.yaml")[0] for name in DRAFTS)
    assert dflash.data == eagle3.data
    assert dflash.eval == eagle3.eval
    assert dflash.target == eagle3.target
    own = {"learning_rate"}
    assert dflash.train.model_dump(exclude=own) == eagle3.train.model_dump(exclude=own)
    assert dflash.eval.max_draft_tokens == 7
    sources = [source for found in dflash.eval.prompts.values() for source in found]
    assert len(sources) >= 3
    assert all((ROOT / source).is_file() for source in sources)


def report(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
    runpy.run_path(str(RECIPE / "report.py"), run_name="__main__")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    return (out / "report.md").read_text()


def measured(path: Path, length: float, **more: Any) -> None:
    sets = {"gsm": {"acceptance_length": length}, "code": {"acceptance_length": None}}
    found = {"per_set": sets, "acceptance_length": length, "lossless": None, **more}
    (path / "eval").mkdir(parents=True)
    (path / "eval/report.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_report_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report(tmp_path, monkeypatch) == "- parts: \n"
    (tmp_path / "dflash").mkdir()
    rows = [
        {"step": i, "loss": 3.0 - i, "acceptance_length": i, "tokens": 1000.0 * i, "seconds": i / 2}
        for i in (1, 2)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3'
    (tmp_path / "dflash/metrics.jsonl").write_text(text)
    measured(tmp_path / "dflash-t0", 2.345, lossless=True, lossless_reason="24 of 24 equal")
    measured(tmp_path / "eagle3-t1", 1.5)
    speeds = {"tokens_per_second": 90.0, "baseline_tokens_per_second": 60.0}
    measured(tmp_path / "dflash-speed", 2.0, **speeds)
    answers = {"seconds": 9.0, "said": ["o.jsonl: 6 of 6 prompts answered; 9 tokens, 1.0 tokens/s"]}
    (tmp_path / "parts.json").write_text(json.dumps({"answers": answers}))

    lines = report(tmp_path, monkeypatch).splitlines()
    assert "| acceptance length | gsm | code | all | greedy answers |" in lines
    assert "| DFlash, T=0 | 2.35 | - | 2.35 | 24 of 24 equal |" in lines
    assert "| EAGLE-3, T=1 | 1.50 | - | 1.50 |  |" in lines
    assert "| DFlash | 2 | 2,000 | 1 | 2,000 | 90 | 60 | 1.50x |" in lines
    assert f"- {answers['said'][0]}" in lines
    assert "- parts: answers 9 s" in lines


@pytest.mark.slow
def test_parts_are_named(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE / "run.py"), str(tmp_path / "out"), "train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train: no such part; parts are answers, dflash, eagle3, eval" in done.stderr
    assert not (tmp_path / "out").exists()
