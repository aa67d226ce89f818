"""The doctor on a trained draft: it passes as exported, and every planted cause is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("specforge_doctor", reason="specforge-doctor is not installed")

from specforge_doctor.testing import NEAR, Fault, TrainedRun, epsilon, other_weights, rope, values

pytestmark = pytest.mark.slow  # a whole run is trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    strategy = {"name": "dflash", "block_size": 4, "num_layers": 2, "layers": [1, 4]}
    return TrainedRun.make(tmp_path_factory.mktemp("trained"), strategy, max_steps=80)


def test_a_clean_export_passes_and_all_numbers_agree(trained: TrainedRun) -> None:
    report = trained.diagnose()
    assert report.verdict.healthy, report.verdict.message
    found = values(report)
    assert found["reference loop"] is not None
    assert found["reference loop"] > 2
    # counts of accepted tokens: rounding decides near ties, and one answer then goes on differently
    assert found["reference loop, export"] == pytest.approx(found["reference loop"], rel=0.03)
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=NEAR)
    assert not report.different
    assert any("no engine was measured: target.engine=transformers" in n for n in report.notes)


def test_the_next_token_layout_agrees_too(trained: TrainedRun, tmp_path: Path) -> None:
    report = trained.train_again(tmp_path, "strategy.label_layout=next_token")
    assert report.verdict.healthy, report.verdict.message
    found = values(report)
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=NEAR)


def layer_ids(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"]["target_layer_ids"] = [2, 5]


def label_layout(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"] |= {"label_layout": "next_token", "sample_from_anchor": True}


def norms(config: dict[str, Any], weights: dict[str, Any]) -> None:
    one, other = "layers.0.input_layernorm.weight", "hidden_norm.weight"
    weights[one], weights[other] = 3 * weights[other], -weights[one]


def mask_token(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["dflash_config"]["mask_token_id"] = 5


def block_size(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["block_size"] = config["dflash_config"]["block_size"] = 8


FAULTS: tuple[tuple[Fault, str, str], ...] = (
    (layer_ids, "layer ids", r"dflash_config.target_layer_ids is [2, 5], expected [1, 4]"),
    (label_layout, "label layout", 'label_layout is "next_token", expected "same_position"'),
    (norms, "norms", "accepted, its checkpoint"),
    (epsilon, "norms", "Cause: norms: rms_norm_eps is 0.5, expected 1e-06"),
    (rope, "rope", "rope_parameters.rope_theta is 100.0, expected 10000.0"),
    (mask_token, "mask token", "mask_token_id is 5, expected 259"),
    (block_size, "block size", "block_size is 8, expected 4"),
    (other_weights, "weights", "fc.weight is"),
)


@pytest.mark.parametrize(("fault", "cause", "text"), FAULTS, ids=[p[0].__name__ for p in FAULTS])
def test_a_planted_fault_is_named(
    trained: TrainedRun, tmp_path: Path, fault: Fault, cause: str, text: str
) -> None:
    named, message = trained.diagnose_fault(tmp_path, fault)
    assert named == cause
    assert text in message


def test_another_template_than_in_training_is_named(trained: TrainedRun) -> None:
    report = trained.diagnose("data.chat_template_kwargs={date: today}")
    assert report.verdict.cause == "template"
    assert "or data.chat_template_kwargs, of the checkpoint is" in report.verdict.message
