"""What a checkpoint holds, and that a resumed draft has the rest of it too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from specforge_core.drafts.checkpoint import check_files, checkpoints, find
from specforge_core.drafts.load import restore
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import CheckpointError, RunError
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import load, losses
from specforge_core.train import checkpoint
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

# a draft that is an adapter on a base, as of a target's own layers
ADAPTED = """
    import torch
    from torch import nn
    from specforge_core import hookimpl
    from specforge_core.types import Draft
    from specforge_linear import (
        Head, specforge_adapter, specforge_config, specforge_train_step)

    class Adapted(nn.Module):
        def __init__(self, target):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(7)  # the same whenever it is built
                self.base = Head(target.hidden_size, target.hidden_size).requires_grad_(False)
            self.head = Head(target.hidden_size, target.vocab_size)

        def forward(self, hidden):
            return self.head(self.base(hidden))

    @hookimpl
    def specforge_draft(target):
        frozen = nn.Linear(3, 3)
        saved = lambda name: not name.startswith("base.")
        return Draft(model=Adapted(target), frozen=frozen, saved=saved)
    """


@pytest.fixture
def config(tmp_path: Path, toy_target: Path, env: FakeSite) -> Path:
    env.strategy("adapted", ADAPTED)
    return linear_run(tmp_path, toy_target)


def names(path: Path) -> set[str]:
    found: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.slow
def test_what_is_not_to_be_saved_is_not_and_is_there_again(config: Path, tmp_path: Path) -> None:
    options = ("strategy.name=adapted", "train.keep=9")
    train(*load(config, *options))
    stored = names(find(tmp_path / "run"))
    assert {n for n in stored if n.startswith("model.")} == {"model.head.weight", "model.head.bias"}
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(checkpoints(again)[-1])
    train(*load(config, *options, f"output_dir={again}"))
    assert losses(again) == losses(tmp_path / "run")
    run, strategy = load(config, *options)
    model = restore(run, strategy, tmp_path / "run").draft.model
    fresh = strategy.draft(run.strategy, restore(run, strategy, again).target, None).model
    assert torch.equal(model.base.weight, fresh.base.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(model.head.weight, fresh.head.weight)  # type: ignore[union-attr, arg-type]


def test_a_checkpoint_that_cannot_be_written_keeps_the_ones_before_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*load(config, "train.max_steps=3"))
    before = names(find(tmp_path / "run"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        train(*load(config, "train.max_steps=6"))
    (kept,) = checkpoints(tmp_path / "run")
    assert names(kept) == before
    assert check_files(kept)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_a_checkpoint_whose_files_were_changed_is_not_used(config: Path, tmp_path: Path) -> None:
    run, strategy = load(config, "train.max_steps=3")
    train(run, strategy)
    path = find(tmp_path / "run")
    assert str(verify_draft(tmp_path / "run")).endswith("1 checkpoint are as they were written")
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    message = r"is damaged: its checksum is .* Restore it, .* Try: output_dir=ANOTHER"
    with pytest.raises(CheckpointError, match=message):
        train(*load(config))
    with pytest.raises(CheckpointError, match=message):
        restore(run, strategy, tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        verify_draft(tmp_path / "run")
    (path / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged: it names no file"):
        verify_draft(path)
    (path / "checksums.json").unlink()  # as a version without them would have written it
    assert "no checksums are with 1 of 1 checkpoint" in str(verify_draft(path))
    restore(run, strategy, tmp_path / "run")


def test_a_run_that_was_killed_behind_its_last_checkpoint_keeps_no_more_than_it_may(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before old ones were dropped: the run has nothing left to do, but for that."""
    options = ("train.save_every=2", "train.keep=2", "train.max_steps=6")

    def killed(*_: object) -> None:
        if len(checkpoints(tmp_path / "run")) == 3:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "tidy", killed)
        with pytest.raises(SystemExit):
            train(*load(config, *options))
    assert len(checkpoints(tmp_path / "run")) == 3
    assert train(*load(config, *options)).finished
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        "step-00000004",
        "step-00000006",
    ]
    assert (tmp_path / "run" / "latest").resolve() == find(tmp_path / "run")


def test_a_file_called_like_a_link_is_told_of_and_stays(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*load(config, "train.max_steps=1"))
    (tmp_path / "run/latest").unlink()
    (tmp_path / "run/latest").write_text("mine")
    capsys.readouterr()
    train(*load(config, "train.max_steps=2"))
    assert "run/latest is no link to a checkpoint of this run. It stays" in capsys.readouterr().err
    assert (tmp_path / "run/latest").read_text() == "mine"
