from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.errors import CheckpointError, PluginError
from specforge_core.load import load_config
from specforge_core.testing.toy import write_conversations
from specforge_core.train import checkpoint
from specforge_core.train.run import train


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    """A finished run of two steps."""
    data = write_conversations(tmp_path / "train.jsonl", 4)
    raw = {
        "target": {"path": str(toy_target)},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)]},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 2, "save_every": 1, "schedule": "constant", "device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    train(*load_config(path))
    return path


def test_a_run_and_its_newest_checkpoint_are_the_same_draft(config: Path, tmp_path: Path) -> None:
    run, strategy = load_config(config)
    newest = tmp_path / "run/checkpoints/step-00000002"
    one, two = (restore(run, strategy, p).draft.model for p in (tmp_path / "run", newest))
    older = restore(run, strategy, newest.with_name("step-00000001")).draft.model
    for a, b, c in zip(one.parameters(), two.parameters(), older.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_an_export_keeps_the_weights_and_says_where_they_came_from(
    config: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run, strategy = load_config(config)
    out = export_checkpoint(tmp_path / "run", "hf", tmp_path / "out", force=False)
    stored = load_file(out / "model.safetensors")
    model = restore(run, strategy, tmp_path / "run").draft.model
    assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items())
    provenance = yaml.safe_load((out / "provenance.json").read_text())
    assert provenance["strategy"] == "linear"
    assert provenance["step"] == 2
    assert provenance["capture"]["layers"] == [4]
    with pytest.raises(PluginError, match="'linear' cannot load an exported directory"):
        restore(run, strategy, out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / checkpoint.STATE).unlink(), "holds no complete checkpoint"),
        (lambda p: (p / checkpoint.STATE).write_text("{"), "is damaged"),
        (lambda p: (p / checkpoint.STATE).write_text("{}"), "is damaged"),
        (lambda p: next(p.glob("*.safetensors")).unlink(), r"\.safetensors is missing"),
        (
            lambda p: next(p.glob("*.safetensors")).write_bytes(b"\x00" * 100),
            "is damaged",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(
    config: Path, tmp_path: Path, damage: object, message: str
) -> None:
    for path in checkpoint.checkpoints(tmp_path / "run"):
        damage(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        restore(*load_config(config), tmp_path / "run")
