"""For tests of a method under `specforge doctor`: a trained run, and faults for its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from specforge_core.checksums import folder_checksums, sealed
from specforge_core.cli import cli
from specforge_core.drafts.export import PROVENANCE
from specforge_core.drafts.load import export_checkpoint
from specforge_core.load import load_config
from specforge_core.testing.predictable import save_predictable_target, write_own_answers
from specforge_core.train.run import train

from .report import DoctorReport
from .run import diagnose

# relative, of simulated and drafted tokens: captured states are bfloat16, and their rounding may
# decide near ties at some three of the 150 tokens that a toy run compares, by two drafts each
NEAR = 0.015

Fault = Callable[[dict[str, Any], dict[str, Any]], None]  # changes an export's config and weights


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run whose drafts are mostly accepted, and its export, in one directory."""

    path: Path

    @classmethod
    def make(
        cls, path: Path, strategy: Mapping[str, Any], *, max_steps: int, format: str = "hf"
    ) -> TrainedRun:
        """Train a draft for a predictable toy target in seconds, and export it."""
        save_predictable_target(path / "target", num_hidden_layers=8)
        data = write_own_answers(path / "target", path / "train.jsonl", 48, length=40)
        held = write_own_answers(path / "target", path / "held.jsonl", 8, length=1, seed=7)
        settings: dict[str, Any] = {"batch_size": 8, "learning_rate": 0.01}
        settings |= {"device": "cpu", "compute_dtype": "float32"}
        raw: dict[str, Any] = {
            "target": {"path": str(path / "target"), "dtype": "float32"},
            "strategy": dict(strategy),
            "data": {"train": [str(data)]},
            "output_dir": str(path / "run"),
            "train": {"max_steps": max_steps, **settings},
            "eval": {"prompts": {"held": str(held)}, "max_new_tokens": 20},
        }
        (path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        train(*load_config(path / "run.yaml"))
        export_checkpoint(path / "run", format, path / "export", force=False)
        return cls(path)

    def diagnose(self, *overrides: str) -> DoctorReport:
        """Compare the export with the run, as `specforge doctor` does."""
        run, strategy = load_config(self.path / "run.yaml", overrides)
        return diagnose(run, strategy, self.path / "run", self.path / "export")

    def train_again(self, path: Path, *overrides: str) -> DoctorReport:
        """Train with other options into `path`, and compare that."""
        options = (*overrides, f"output_dir={path / 'run'}")
        run, strategy = load_config(self.path / "run.yaml", options)
        train(run, strategy)
        export_checkpoint(path / "run", "hf", path / "export", force=False)
        return diagnose(run, strategy, path / "run", path / "export")

    def diagnose_fault(self, path: Path, fault: Fault) -> tuple[str | None, str]:
        """Put a fault into a copy of the export; return the cause that is named, and how.

        Goes through the command, and asserts that it fails with the message of the report.
        """
        export = path / "export"
        shutil.copytree(self.path / "export", export)
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        weights = load_file(export / "model.safetensors")
        fault(config, weights)
        (export / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, export / "model.safetensors")
        told = json.loads((export / PROVENANCE).read_text(encoding="utf-8"))
        told["checksums"] = folder_checksums(export)  # written so, not damaged
        (export / PROVENANCE).write_text(json.dumps(sealed(told)), encoding="utf-8")
        done = CliRunner().invoke(
            cli,
            [
                *("doctor", "-c", str(self.path / "run.yaml"), "--draft", str(self.path / "run")),
                *("--export", str(export), "--json", f"output_dir={path / 'out'}"),
            ],
        )
        assert done.exit_code == 1, done.output
        report = json.loads((path / "out/doctor/report.json").read_text(encoding="utf-8"))
        assert not report["healthy"]
        assert str(done.exception) == report["message"]
        assert f"Try: specforge export --checkpoint {self.path}" in report["message"]
        return report["cause"], report["message"]


def values(report: DoctorReport) -> dict[str, float | None]:
    """Return the acceptance lengths of a report, by what measured them."""
    return {found.name: found.value for found in report.measurements}


def epsilon(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """Set another epsilon of the norms."""
    config["rms_norm_eps"] = 0.5


def rope(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """Set another rotary base, in both spellings."""
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0


def other_weights(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """Turn a projection of the captured states around."""
    weights["fc.weight"] = weights["fc.weight"].flip(1)
