"""A capture is worth the same whatever dtype its target computed in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specforge_core import cpu
from specforge_core.capture.job import run_capture
from specforge_core.capture.verify import verify_directory
from specforge_core.drafts import checkpoint
from specforge_core.testing.runs import load, losses
from specforge_core.train.plan import plan_run
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_capture_of_one_dtype_trains_and_verifies_with_another(
    tmp_path: Path, toy_target: Path, one: str, other: str
) -> None:
    config = linear_run(tmp_path, toy_target)
    stored = f"data.capture_dir={tmp_path / 'capture'}"
    manifest = run_capture(*load(config, stored, f"target.dtype={one}"))
    assert manifest.identity.fields["hidden"][1] == "bfloat16"
    run, strategy = load(config, stored, f"target.dtype={other}", f"train.compute_dtype={other}")
    verify_directory(tmp_path / "capture", run, strategy, 4)
    assert train(run, strategy).step == 6
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_chosen_for_the_machine_and_recorded(
    tmp_path: Path,
    toy_target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: bool,
) -> None:
    monkeypatch.setattr(cpu, "has_fast_bfloat16", lambda: fast)
    config = linear_run(tmp_path, toy_target)
    run, strategy = load(config, "target.dtype=auto", "train.compute_dtype=auto")
    chosen = "bfloat16" if fast else "float32"
    # the toy target is stored in float32, and auto takes no bits away
    line = f"cpu: draft in {chosen}, target in float32, {torch.get_num_threads()} thread(s)"
    assert f"machine: '{line}'" in plan_run(run, strategy, 1)
    train(run, strategy)
    assert f"training on {line}" in capsys.readouterr().err
    machine = checkpoint.read_state(checkpoint.find(tmp_path / "run")).machine
    assert machine["compute_dtype"] == chosen
    assert machine["target_dtype"] == "float32"
    assert machine["threads"] == torch.get_num_threads()
