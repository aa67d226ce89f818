"""Training by `train.batch_tokens`."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from specforge_core.drafts.checkpoint import checkpoints
from specforge_core.errors import ConfigError
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, lines, load
from specforge_core.train.run import train

from ..runs import linear_run, weights

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.mark.slow
def test_steps_of_tokens_end_with_the_epochs_and_are_taken_up_again(
    config: Path, tmp_path: Path
) -> None:
    sizes = ("data.max_length=64", "train.batch_tokens=96", "train.accumulate=1")
    options = (*sizes, "train.max_steps=null", "train.epochs=2", "train.save_every=4")
    whole = train(*load(config, *options))
    rows = lines(tmp_path / "run")
    steps = [after - before for before, after in pairwise([0.0, *(row["tokens"] for row in rows)])]
    assert max(steps) <= 96
    assert whole.finished
    assert whole.step == whole.total_steps == len(steps)
    assert sum(steps) % 2 == 0  # both epochs have all tokens
    found = weights(tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    again = train(*load(config, *options))
    assert again.step == whole.step
    assert again.num_tokens == whole.num_tokens
    assert all(torch.equal(t, found[name]) for name, t in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_ranks_change_in_the_middle_of_an_epoch(config: Path, tmp_path: Path) -> None:
    """All samples of the epochs come: there are as many tokens as on one rank throughout."""
    sizes = ("data.max_length=64", "train.batch_tokens=96", "train.accumulate=1")
    options = (*sizes, "train.max_steps=null", "train.epochs=3", "train.keep=9")
    whole = train(*load(config, *options, "train.save_every=2"))
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    for checkpoint in checkpoints(tmp_path / "run")[2:]:  # as if killed after its fourth step
        shutil.rmtree(checkpoint)
    finish(cli("train", "-c", str(config), "--nproc", "2", *options, "train.save_every=100"))
    rows = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert rows[-1]["tokens"] == whole.num_tokens
    assert rows[-1]["step"] < whole.step


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("data.max_length=128", "Try: train.batch_tokens=512"),
        ("data.follow=true", "cannot be had with data.follow"),
    ],
)
def test_steps_of_tokens_that_cannot_be_are_refused(config: Path, option: str, said: str) -> None:
    options = ("data.max_length=64", "train.batch_tokens=96", "data.capture_dir=x", option)
    with pytest.raises(ConfigError, match=said):
        load(config, *options)
