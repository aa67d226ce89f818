"""DFlash through the real trainer, on a toy target: offline, online, two ranks, eval, export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specforge_core.capture.worker import run_capture
from specforge_core.config import RunConfig, load_config
from specforge_core.evaluate.run import evaluate
from specforge_core.restore import export_checkpoint, restore
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    """Every possible anchor is used, so that no draw decides what a step sees."""
    data = write_conversations(tmp_path / "train.jsonl", 16)
    raw: dict[str, Any] = {
        "target": {"path": str(toy_target), "dtype": "float32"},
        "strategy": {
            "name": "dflash",
            "block_size": 4,
            "num_layers": 2,
            "num_anchors": 512,
        },
        "data": {"train": [str(data)], "max_length": 256},
        "capture": {"window": 4},
        "output_dir": str(tmp_path / "run"),
        "train": {
            "max_steps": 8,
            "batch_size": 1,
            "accumulate": 4,
            "learning_rate": 0.003,
            "log_every": 1,
            "device": "cpu",
        },
        "eval": {"prompts": {"toy": str(data)}, "limit": 2, "max_new_tokens": 12},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load(config: Path, *overrides: str) -> tuple[RunConfig, Strategy]:
    return load_config(config, overrides)


def losses(output_dir: Path) -> list[float]:
    text = (output_dir / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_offline_training_gives_what_online_training_gives(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.9 * found[0]
    offline = (f"data.capture_dir={tmp_path / 'capture'}", f"output_dir={tmp_path / 'offline'}")
    assert run_capture(*load(config, *offline)).num_samples == 16
    train(*load(config, *offline))
    assert losses(tmp_path / "offline") == found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
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
    command = ("train", "-c", str(config), "--nproc", "2", *two)
    done = subprocess.run(
        [sys.executable, "-m", "specforge_core.cli", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)
