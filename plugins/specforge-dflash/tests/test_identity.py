"""A draft that is read with other options than it was trained with is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.errors import CheckpointError
from specforge_core.testing.runs import load, write_run
from specforge_core.train.run import train

OTHERWISE = {
    "strategy.layers=[1,4]": r"strategy\.layers: \[1,3\] in it, \[1,4\] in this run",
    "strategy.label_layout=next_token": r"strategy\.label_layout: same_position in it, next_token",
    "strategy.mask_token_id=5": r"strategy\.mask_token_id: 259 in it, 5 in this run",
    "strategy.rope_theta=77": r"strategy\.rope_theta: null in it, 77\.0 in this run",
    "strategy.block_size=8": r"strategy\.block_size: 4 in it, 8 in this run",
    "strategy.causal=true": r"strategy\.causal: false in it, true in this run",
    "strategy.weighting=dpace": r"strategy\.weighting: decay in it, dpace in this run",
    "strategy.variable_prefix=1": r"strategy\.variable_prefix: 0 in it, 1 in this run",
    "strategy.loss=kl": r"strategy\.loss: ce in it, kl in this run",
    "strategy.labels=target": r"strategy\.labels: data in it, target in this run",
    "strategy.num_anchors=9": r"strategy\.num_anchors: 8 in it, 9 in this run",
}
SAID_AT_START = ("weighting", "num_anchors", "loss", "labels", "variable_prefix")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    path = tmp_path_factory.mktemp("trained")
    options = {"name": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 8}
    config = write_run(path, toy_target, conversations=8, strategy=options, train={"max_steps": 2})
    train(*load(config))
    export_checkpoint(path / "run", "hf", path / "export", force=False)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("option", "message"), OTHERWISE.items(), ids=OTHERWISE)
def test_what_made_the_draft_counts(
    config: Path,
    tmp_path: Path,
    option: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config.parent
    with pytest.raises(CheckpointError, match=message):
        train(*load(config, "train.max_steps=3", option))
    for draft in ("run", "export"):
        with pytest.raises(CheckpointError, match=message):
            restore(*load(config, option), path / draft)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(path / "run", "hf", tmp_path / "out", force=False, overrides=(option,))
    start = load(
        config, option, f"train.init_from={path / 'run'}", f"output_dir={tmp_path / 'run'}"
    )
    if any(name in option for name in SAID_AT_START):
        train(*start)
        assert "were made otherwise: strategy." in capsys.readouterr().err
    else:
        with pytest.raises(CheckpointError, match=message):
            train(*start)


@pytest.mark.parametrize(
    "option",
    [
        "strategy.attention=eager",
        "strategy.head_chunk=64",
        "strategy.export_dtype=float32",
        "strategy.batches=padded",
        "strategy.mask_token_id=259",  # what the rules chose
        "strategy.layers=[1,3]",
    ],
)
def test_what_does_not_make_the_draft_may_change(config: Path, option: str) -> None:
    for draft in ("run", "export"):
        restore(*load(config, option), config.parent / draft)
