"""A training run of the linear example on a toy target, and what is read from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from specforge_core.config import RunConfig, load_config
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import write_conversations
from specforge_core.train import checkpoint


def write_run(tmp_path: Path, toy_target: Path) -> Path:
    """Write the config of a run of 6 steps over 20 ragged conversations, in float32."""
    data = write_conversations(tmp_path / "train.jsonl", 20)
    raw: dict[str, Any] = {
        "target": {"path": str(toy_target), "dtype": "float32", "batch_tokens": 256},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)]},
        "capture": {"window": 4},
        "output_dir": str(tmp_path / "run"),
        "train": {
            "max_steps": 6,
            "batch_size": 2,
            "accumulate": 2,
            "learning_rate": 0.05,
            "log_every": 1,
            "save_every": 3,
            "device": "cpu",
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load(config: Path, *overrides: str) -> tuple[RunConfig, Strategy]:
    return load_config(config, overrides)


def lines(output_dir: Path) -> list[dict[str, Any]]:
    text = (output_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [row["loss"] for row in lines(output_dir)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.find(path).glob("*.safetensors")):
        found |= load_file(file)
    return found


def cli(*arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "specforge_core.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out
