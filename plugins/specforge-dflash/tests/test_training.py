"""DFlash through the real trainer, on a toy target: offline, online, two ranks, eval, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specforge_core.capture.job import run_capture
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.evaluate.run import evaluate
from specforge_core.testing.close import close
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, load, losses, write_run
from specforge_core.train.run import train


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    held = {"prompts": {"toy": str(tmp_path / "train.jsonl")}, "limit": 2, "max_new_tokens": 12}
    return write_run(
        tmp_path,
        toy_target,
        conversations=16,
        strategy={"name": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 8},
        data={"max_length": 256},
        train={"max_steps": 8, "batch_size": 1, "accumulate": 4, "learning_rate": 0.003},
        eval=held,
    )


@pytest.mark.slow
def test_offline_training_gives_what_online_training_gives(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.9 * found[0]
    offline = (f"data.capture_dir={tmp_path / 'capture'}", f"output_dir={tmp_path / 'offline'}")
    assert run_capture(*load(config, *offline)).num_samples == 16
    train(*load(config, *offline))
    assert losses(tmp_path / "offline") == found


@pytest.mark.slow
def test_recomputed_units_train_alike_sharded_and_in_bfloat16(config: Path, tmp_path: Path) -> None:
    for name in ("false", "true"):
        options = (f"train.recompute={name}", f"output_dir={tmp_path / name}")
        train(*load(config, *options, "train.compute_dtype=bfloat16", "train.max_steps=2"))
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


@pytest.mark.slow
def test_float8_trains_about_as_float32_and_may_come_and_go(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    float8 = ("train.precision=fp8", f"output_dir={tmp_path / 'float8'}")
    train(*load(config, *float8))
    found, plain = losses(tmp_path / "float8"), losses(tmp_path / "run")
    assert found != plain
    assert found[-1] < 0.9 * found[0]
    assert found[-1] == pytest.approx(plain[-1], rel=0.02)
    # on two ranks numbers are summed in another order, and may be rounded to others in float8
    two = (*float8, "train.accumulate=2", f"output_dir={tmp_path / 'two'}")
    finish(cli("train", "-c", str(config), "--nproc", "2", *two))
    assert losses(tmp_path / "two") == pytest.approx(found, rel=0.01)
    # what they saved goes on without float8, and that with it
    train(*load(config, *two, "train.precision=null", "train.max_steps=9"))
    train(*load(config, *two, "train.recompute=true", "train.max_steps=10"))
    assert len(losses(tmp_path / "two")) == 10
    run, strategy = load(config)
    trained = restore(run, strategy, tmp_path / "two").draft  # as any other
    assert evaluate(run, strategy, trained).lossless is True


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_trained_draft_decodes_losslessly_and_its_export_is_the_same_draft(
    config: Path, tmp_path: Path, optimizer: str
) -> None:
    options = (f"train.optimizer={optimizer}", "strategy.export_dtype=float32")
    train(*load(config, *options, "train.max_steps=3"))
    run, strategy = load(config, *options)
    trained = restore(run, strategy, tmp_path / "run").draft
    assert evaluate(run, strategy, trained).lossless is True
    out = export_checkpoint(tmp_path / "run", "sglang", tmp_path / "export", force=False)
    again = restore(run, strategy, out).draft
    for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_samples_too_short_for_a_block_are_skipped_and_counted(
    config: Path, tmp_path: Path
) -> None:
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(short) + "\n")
    manifest = run_capture(*load(config, f"data.capture_dir={tmp_path / 'capture'}"))
    assert (manifest.num_samples, manifest.num_skipped) == (16, 1)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    two = ("train.accumulate=2", f"output_dir={tmp_path / 'two'}")
    finish(cli("train", "-c", str(config), "--nproc", "2", *two))
    # sums over 32, 64 and 260 in layers and steps; AdamW's division by small moments widens it
    close(losses(tmp_path / "two"), losses(tmp_path / "run"), terms=6000, dtype=torch.float32)
