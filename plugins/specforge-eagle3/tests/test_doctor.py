"""The doctor on a trained draft: it passes as exported, and every planted cause is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.errors import ConfigError

pytest.importorskip("specforge_doctor", reason="specforge-doctor is not installed")

from specforge_doctor.testing import NEAR, Fault, TrainedRun, epsilon, other_weights, rope, values

pytestmark = pytest.mark.slow  # a whole run is trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    strategy = {
        "name": "eagle3",
        "steps": 3,
        "draft_length": 3,
        "draft_vocab_size": 24,
        "layers": [1, 3, 5],
    }
    return TrainedRun.make(tmp_path_factory.mktemp("trained"), strategy, max_steps=60)


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


@pytest.mark.parametrize(
    "option", ["mask_on=input", "mask_on=feature", "steps=2", "draft_length=2"]
)
def test_the_simulation_is_what_is_drafted_whatever_is_trained_on(
    trained: TrainedRun, tmp_path: Path, option: str
) -> None:
    found = values(trained.train_again(tmp_path, f"strategy.{option}", "train.max_steps=30"))
    # where the feature's token decides, the first token of an answer is no label
    # (0.05); else rounding decides near ties
    near = 0.05 if option == "mask_on=feature" else NEAR
    assert found["trainer, simulated"] == pytest.approx(found["draft, at every token"], rel=near)


def test_trees_are_no_chains(trained: TrainedRun) -> None:
    with pytest.raises(ConfigError, match="compares drafted chains, and this run drafts trees"):
        trained.diagnose("strategy.tree_top_k=2")


def layer_ids(config: dict[str, Any], weights: dict[str, Any]) -> None:
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [2, 4, 6]


def norms(config: dict[str, Any], weights: dict[str, Any]) -> None:
    one, other = "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"
    weights[one], weights[other] = 3 * weights[other], -weights[one]


def vocabulary(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """Every drafted token is the one after."""
    weights["d2t"] = weights["d2t"] + 1
    weights["t2d"] = weights["t2d"].roll(1)


def absolute_ids(config: dict[str, Any], weights: dict[str, Any]) -> None:
    weights["d2t"] = weights["d2t"] + torch.arange(24)


def two_causes(config: dict[str, Any], weights: dict[str, Any]) -> None:
    layer_ids(config, weights)
    vocabulary(config, weights)


FAULTS: tuple[tuple[Fault, str, str], ...] = (
    (layer_ids, "layer ids", "eagle_aux_hidden_state_layer_ids is [2, 4, 6], expected [1, 3, 5]"),
    (norms, "norms", "accepted, its checkpoint"),
    (epsilon, "norms", "Cause: norms: rms_norm_eps is 0.5, expected 1e-06"),
    (rope, "rope", "rope_parameters.rope_theta is 100.0, expected 10000.0"),
    (vocabulary, "vocabulary map", "Cause: vocabulary map: d2t is"),
    (absolute_ids, "vocabulary map", "Were absolute ids stored?"),
    (other_weights, "weights", "fc.weight is"),
    (two_causes, "layer ids", "Cause: layer ids together with vocabulary map"),
)


@pytest.mark.parametrize(("fault", "cause", "text"), FAULTS, ids=[p[0].__name__ for p in FAULTS])
def test_a_fault_is_named(
    trained: TrainedRun, tmp_path: Path, fault: Fault, cause: str, text: str
) -> None:
    named, message = trained.diagnose_fault(tmp_path, fault)
    assert named == cause
    assert text in message


def test_another_template_than_in_training_is_named(trained: TrainedRun) -> None:
    report = trained.diagnose("data.chat_template_kwargs={date: today}")
    assert report.verdict.cause == "template"
    assert "or data.chat_template_kwargs, of the checkpoint is" in report.verdict.message
