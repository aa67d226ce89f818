"""The doctor on a trained draft: it passes as exported, and every planted cause is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from specforge_core.cli import cli
from specforge_core.config import load_config
from specforge_core.doctor.report import DoctorReport
from specforge_core.doctor.run import diagnose
from specforge_core.restore import export_checkpoint
from specforge_core.testing.predictable import save_predictable_target, write_own_answers
from specforge_core.train.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with run.yaml, a run whose drafts are mostly accepted, and its export."""
    path = tmp_path_factory.mktemp("trained")
    save_predictable_target(path / "target", num_hidden_layers=8)
    data = write_own_answers(path / "target", path / "train.jsonl", 48, length=40)
    held = write_own_answers(path / "target", path / "held.jsonl", 8, length=1, seed=7)
    raw: dict[str, Any] = {
        "target": {"path": str(path / "target"), "dtype": "float32"},
        "strategy": {"name": "dflash", "block_size": 4, "num_layers": 2, "layers": [1, 4]},
        "data": {"train": [str(data)]},
        "output_dir": str(path / "run"),
        "train": {"max_steps": 80, "batch_size": 8, "learning_rate": 0.01, "device": "cpu"},
        "eval": {"prompts": {"held": str(held)}, "max_new_tokens": 20},
    }
    (path / "run.yaml").write_text(yaml.safe_dump(raw))
    train(*load_config(path / "run.yaml"))
    export_checkpoint(path / "run", "sglang", path / "export", force=False)
    return path


def examine(trained: Path, export: Path, *overrides: str) -> DoctorReport:
    run, strategy = load_config(trained / "run.yaml", overrides)
    return diagnose(run, strategy, trained / "run", export)


def values(report: DoctorReport) -> dict[str, float | None]:
    return {found.name: found.value for found in report.measurements}


def test_a_clean_export_passes_and_all_numbers_agree(trained: Path) -> None:
    report = examine(trained, trained / "export")
    assert report.verdict.healthy, report.verdict.message
    found = values(report)
    assert found["reference loop"] is not None
    assert found["reference loop"] > 2
    assert found["reference loop, export"] == pytest.approx(found["reference loop"], rel=0.03)
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=0.005)
    assert not report.different
    assert any("no engine was measured: target.engine=transformers" in n for n in report.notes)


@pytest.mark.slow
def test_the_next_token_layout_agrees_too(trained: Path, tmp_path: Path) -> None:
    options = ("strategy.label_layout=next_token", f"output_dir={tmp_path / 'run'}")
    run, strategy = load_config(trained / "run.yaml", options)
    train(run, strategy)
    export_checkpoint(tmp_path / "run", "hf", tmp_path / "export", force=False)
    report = diagnose(run, strategy, tmp_path / "run", tmp_path / "export")
    assert report.verdict.healthy, report.verdict.message
    found = values(report)
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=0.005)


Plant = Callable[[dict[str, Any], dict[str, Any]], None]  # changes config and weights


def layer_ids(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"]["target_layer_ids"] = [2, 5]


def label_layout(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"] |= {"label_layout": "next_token", "sample_from_anchor": True}


def norms(config: dict[str, Any], weights: dict[str, Any]) -> None:
    one, other = "layers.0.input_layernorm.weight", "hidden_norm.weight"
    weights[one], weights[other] = 3 * weights[other], -weights[one]


def epsilon(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 0.5


def rope(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0


def mask_token(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"]["mask_token_id"] = 5


def block_size(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["block_size"] = config["dflash_config"]["block_size"] = 8


def other_weights(config: dict[str, Any], weights: dict[str, Any]) -> None:
    weights["fc.weight"] = weights["fc.weight"].flip(1)


PLANTED: tuple[tuple[Plant, str, str], ...] = (
    (layer_ids, "layer ids", r"dflash_config.target_layer_ids is [2, 5], expected [1, 4]"),
    (label_layout, "label layout", 'label_layout is "next_token", expected "same_position"'),
    (norms, "norms", "accepted, its checkpoint"),
    (epsilon, "norms", "which only an engine reads: rms_norm_eps is 0.5, expected 1e-06"),
    (rope, "rope", "rope_parameters.rope_theta is 100.0, expected 10000.0"),
    (mask_token, "mask token", "mask_token_id is 5, expected 259"),
    (block_size, "block size", "block_size is 8, expected 4"),
    (other_weights, "weights", "fc.weight is"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "cause", "text"), PLANTED, ids=[p[0].__name__ for p in PLANTED])
def test_a_planted_cause_is_named(
    trained: Path, tmp_path: Path, plant: Plant, cause: str, text: str
) -> None:
    export = tmp_path / "export"
    shutil.copytree(trained / "export", export)
    config = json.loads((export / "config.json").read_text())
    weights = load_file(export / "model.safetensors")
    plant(config, weights)
    (export / "config.json").write_text(json.dumps(config))
    save_file(weights, export / "model.safetensors")
    done = CliRunner().invoke(
        cli,
        [
            *("doctor", "-c", str(trained / "run.yaml"), "--draft", str(trained / "run")),
            *("--export", str(export), "--json", f"output_dir={tmp_path / 'out'}"),
        ],
    )
    assert done.exit_code == 1
    report = json.loads((tmp_path / "out" / "doctor" / "report.json").read_text())
    assert (report["healthy"], report["cause"]) == (False, cause)
    assert str(done.exception) == report["message"]
    assert text in report["message"]
    assert f"Try: specforge export --checkpoint {trained}" in report["message"]


def test_another_template_than_in_training_is_named(trained: Path, tmp_path: Path) -> None:
    report = examine(trained, trained / "export", "data.chat_template_kwargs={date: today}")
    assert report.verdict.cause == "template"
    assert "or data.chat_template_kwargs, of the checkpoint is" in report.verdict.message
