"""The table that benchmarks/all.py ends with, of what its pieces printed."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("specforge_dflash", reason="the DFlash plugin is not installed")

FOLDER = Path(__file__).parents[1] / "benchmarks"
PRINTED = """
head trained; warm-up 21 s
step (forward + backward), median of 8: 56.5 ms
  spread 56.1 to 57.0 ms; forward 20.0 ms
floor: 30.1 TFLOP at the measured rate: 41.9 ms
peak memory: 5.3 GiB, of which held between steps 3.1 GiB

head frozen; warm-up 20 s
step (forward + backward), median of 8: 49.5 ms
floor: 28.0 TFLOP at the measured rate: 39.0 ms
peak memory: 4.8 GiB, of which held between steps 3.0 GiB
"""
ROW = {"tokens": 5e4, "waiting": 0.003, "idle": 0.042, "longest": 0.18, "steps": 80, "first": 47.2}
START = {"imports": 8.04, "source": 11.3, "forward": 20.0}


@pytest.fixture
def all_(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("all")


def test_a_steps_numbers_are_found_in_what_it_prints(all_: ModuleType) -> None:
    found = all_.found_in(PRINTED)
    assert found == {"ms": [56.5, 49.5], "floor": [41.9, 39.0], "gib": [5.3, 4.8]}
    assert all_.found_in("Traceback: no such kernel") == {"failed": "Traceback: no such kernel"}


def test_the_table_says_what_was_measured_what_failed_and_what_was_not_run(
    all_: ModuleType,
) -> None:
    one = {"machine": "a", "cold": True, **ROW}
    results = {
        "E1 1": {"machine": "a", **all_.found_in(PRINTED)},
        "eagle3-offline 1": one,
        "eagle3-offline 2": {**one, "tokens": 96_000.0, "cold": False, "start": START},
        "dflash-online 1": {"machine": "a", "failed": "too little memory"},
        "eagle3-online 1": one,
        "eagle3-online 2": {**one, "machine": "b"},
    }
    lines = all_.table(results, [1, 2])
    assert any("head frozen" in line and "49.5 ms, 4.8 GiB" in line for line in lines)
    assert any("96,000 tokens/s (1.92x)" in line for line in lines)
    assert any("dflash-online, 1 GPU" in line and "FAILED" in line for line in lines)
    assert any("D1 DFlash step" in line and "not run" in line for line in lines)
    assert "47 s, warm" in "".join(lines)
    assert "4.2 %" in "".join(lines)
    told = "first line of eagle3-offline 2, seconds: imports 8.0, source 11.3, forward 20.0"
    assert told in lines
    assert lines[-1] == "\ndflash-online 1 FAILED: too little memory"
    # two machines may differ by as much as is looked for
    (online,) = [line for line in lines if line.startswith("eagle3-online, 2")]
    assert "x)" not in online


def test_the_use_of_gpus_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    idle = importlib.import_module("idle")
    said = ["0, 100", "1, 90", "2, 0", "0, 95", "1, 95", "2, 0"]
    assert idle.idle_share(said, {0, 1}) == pytest.approx(0.05)
    assert idle.idle_share(["0, [N/A]"], {0}) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with idle.Idle(1) as looked:
        assert looked.gpus == {2}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with idle.Idle(2) as looked:
        assert looked.gpus == {0, 1}


@pytest.mark.slow
def test_a_piece_ends_when_its_time_is_up_and_leaves_no_process(
    all_: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "left.json"
    script = tmp_path / "step.py"
    script.write_text(
        "import json, os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(left)!r}, 'w').write(json.dumps([os.getpid(), child.pid]))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(all_, "__file__", str(tmp_path / "all.py"))
    for seconds in (5, 20, 60):  # on a busy machine it may not have begun
        found = all_.step("D1", float(seconds), small=True)
        assert found == {"failed": f"not done in {seconds} s"}
        if left.exists():
            break
    until = time.monotonic() + 60
    while any(map(running, json.loads(left.read_text()))):  # the kernel ends them a little later
        assert time.monotonic() < until
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
