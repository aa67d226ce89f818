from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_core.drafts.checkpoint import STATE, checkpoints, find, read_state
from specforge_core.errors import CheckpointError
from specforge_core.testing.runs import load, losses
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


def test_a_run_of_0_1_goes_on_as_it_would_have(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    whole = losses(tmp_path / "run")
    last = find(tmp_path / "run")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    path = find(tmp_path / "run") / STATE
    state = json.loads(path.read_text())
    assert state["step"] == 3
    for name in ("total_steps", "machine"):
        del state[name]
    # 12 samples in all, of which each of two ranks took 6
    position = state.pop("position")
    state |= {"positions": [position // 2, position // 2 + 1], "world_size": 2, "generators": []}
    path.write_text(json.dumps(state))
    found = read_state(path.parent)
    assert (found.position, found.total_steps) == (position, 6)
    train(*load(config))
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": 1, "odd": 2}'])
def test_a_damaged_state_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: .*Use an earlier one"):
        read_state(tmp_path)


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\. Try: specforge"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no state\.json"):
        read_state(tmp_path)
