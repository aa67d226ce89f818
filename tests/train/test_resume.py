"""What a run that is started again says of what was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge_core.drafts.checkpoint import checkpoints
from specforge_core.errors import CheckpointError
from specforge_core.testing.close import close
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import lines, load
from specforge_core.train.run import train

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_longer_run_says_where_its_learning_rate_goes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    options = (f"train.schedule={schedule}", "train.decay_ratio=0.5", "train.warmup_ratio=0")
    train(*load(config, *options))
    assert "learning rate" not in capsys.readouterr().err
    train(*load(config, *options, "train.max_steps=10"))
    rates = [row["learning_rate"] for row in lines(tmp_path / "run")]
    assert rates[5] == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "learning rate" in line]
    assert len(said) == 1
    assert said[0] == (
        f"the learning rate changes from 0 at step 6 to {rates[6]:.3g} at step 7: its schedule "
        f"was {schedule} over 6 steps, and is {schedule} over 10"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("train.schedule=constant",), ("train.schedule=constant", "train.max_steps=8")),
        (("train.max_steps=6",), ("train.max_steps=6",)),
    ],
)
def test_a_learning_rate_that_goes_on_is_not_mentioned(
    config: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, ...], after: tuple[str]
) -> None:
    common = ("train.warmup_ratio=0",)
    train(*load(config, *common, *before))
    train(*load(config, *common, *after))
    err = capsys.readouterr().err
    assert "resuming at step 6" in err
    assert "learning rate" not in err


@pytest.mark.slow
def test_another_peak_and_other_data_are_said_too(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("train.warmup_ratio=0", "train.schedule=constant")
    train(*load(config, *common))
    assert "data." not in capsys.readouterr().err
    other = ("train.learning_rate=0.01", "data.limit=9", "data.too_long=skip", "data.workers=1")
    train(*load(config, *common, "train.max_steps=7", *other))
    err = " ".join(capsys.readouterr().err.split())
    assert "changes from 0.05 at step 6 to 0.01 at step 7" in err
    assert (
        "data.limit was None and is 9; data.too_long was 'truncate' and is 'skip': the run goes on "
        "at the same place of the new data"
    ) in err
    close(lines(tmp_path / "run")[-1]["learning_rate"], 0.01, terms=1)


def test_another_optimizer_is_named(config: Path, env: FakeSite) -> None:
    env.strategy(
        "unit",
        """
        from specforge_core import hookimpl
        from specforge_core.types import Draft
        from specforge_linear import (
            Head, specforge_adapter, specforge_config, specforge_train_step)
        from torch import nn
        @hookimpl
        def specforge_draft(target):
            hidden = Head(target.hidden_size, target.hidden_size)
            model = nn.Sequential(hidden, Head(target.hidden_size, target.vocab_size))
            return Draft(model=model, shard=(hidden,))
        """,
    )
    common = ("strategy.name=unit", "train.save_every=6")
    train(*load(config, *common))
    message = "trained with train.optimizer=adamw, this run has train.optimizer=muon"
    with pytest.raises(CheckpointError, match=f"{message}.* Try: train.optimizer=adamw"):
        train(*load(config, *common, "train.optimizer=muon", "train.max_steps=8"))


@pytest.mark.slow
def test_rows_in_another_order_are_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large plain files are read in a mixed order; with data.limit, or packed, they are not."""
    monkeypatch.setattr("specforge_core.data.prompts.SMALL", 1)
    train(*load(config, "train.max_steps=3"))
    with pytest.raises(CheckpointError, match="limit=null with the files as they were"):
        train(*load(config, "data.limit=1000"))
    train(*load(config, "train.max_steps=4"))
    other = f"output_dir={tmp_path / 'other'}"
    train(*load(config, other, "data.limit=1000", "train.max_steps=3"))
    with pytest.raises(CheckpointError, match="limit=100000000 with the files"):
        train(*load(config, other))
    train(*load(config, other, "data.limit=100000000", "train.max_steps=4"))


@pytest.mark.slow
def test_states_in_bfloat16_are_stored_so_and_go_on_exactly(config: Path, tmp_path: Path) -> None:
    run, strategy = load(config, "train.optimizer_dtype=bfloat16")
    found = []
    for _ in range(2):
        train(run, strategy)
        last = checkpoints(tmp_path / "run")[-1]
        files = sorted(last.glob("*.safetensors"))
        found.append({name: t for file in files for name, t in load_file(file).items()})
        shutil.rmtree(last)  # then as if it had been killed after its third step
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    kept = {str(t.dtype) for n, t in found[0].items() if "exp_avg" in n}
    assert kept == {"torch.bfloat16"}
    with pytest.raises(CheckpointError, match=r"has train.optimizer_dtype=float32, which has no"):
        train(*load(config))
