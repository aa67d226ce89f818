"""Differences of an export by cause, and their repair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_doctor.causes import Difference, differences, repair

from specforge_core.types import Export

CONFIG: dict[str, Any] = {
    "nested": {"target_layer_ids": [1, 2], "mask_token_id": 7},
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "max_position_embeddings": 64,
    "vocab_size": 9,
    "block_size": 4,
    "hidden_size": 8,
    "label_layout": "same",
}


CAUSES = {
    "nested.target_layer_ids": "it reads other layers",
    "label_layout": "labels are shifted",
    "mask_token_id": "it sees another mask",
    "d2t": "draft tokens mean others",
    "block_size": "it drafts more or fewer",
}


def export(**weights: torch.Tensor) -> Export:
    plain = {"fc.weight": torch.ones(2), "norm.weight": torch.ones(2), "d2t": torch.zeros(3)}
    return Export(config=CONFIG, weights={**plain, **weights}, causes=CAUSES)


def causes(found: Export) -> list[str]:
    return [item.cause for item in differences(found, export())]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"nested": {"target_layer_ids": [1, 3], "mask_token_id": 7}}, "it reads other layers"),
        ({"label_layout": "next"}, "labels are shifted"),
        ({"rms_norm_eps": 1e-5}, "norms"),
        ({"norm_output": True}, "norms"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope"),
        ({"max_position_embeddings": 32}, "rope"),
        ({"vocab_size": 8}, "vocabulary"),
        ({"nested": {"target_layer_ids": [1, 2], "mask_token_id": 0}}, "it sees another mask"),
        ({"block_size": 8}, "it drafts more or fewer"),
        ({"hidden_size": 9}, "other settings"),
    ],
)
def test_a_key_belongs_to_its_cause_and_is_repaired(change: dict[str, Any], cause: str) -> None:
    found = Export(config={**CONFIG, **change}, weights=export().weights)
    assert causes(found) == [cause]
    assert causes(repair(found, export(), {"weights"})) == [cause]
    assert not causes(repair(found, export(), {cause}))
    assert found.config == {**CONFIG, **change}  # the original stays


def test_a_missing_and_an_extra_key_are_repaired() -> None:
    config = {k: v for k, v in CONFIG.items() if k != "nested"} | {"x": 1}
    found = Export(config=config, weights=export().weights)
    all_three = ["it reads other layers", "it sees another mask", "other settings"]
    assert causes(found) == all_three
    repaired = repair(found, export(), set(all_three))
    assert repaired.config == CONFIG


@pytest.mark.parametrize(
    ("name", "cause"),
    [("norm.weight", "norms"), ("d2t", "draft tokens mean others"), ("fc.weight", "weights")],
)
def test_a_tensor_belongs_to_its_cause(name: str, cause: str) -> None:
    found = export(**{name: torch.full((2,), 3.0)})
    assert causes(found) == [cause]
    assert not causes(repair(found, export(), {cause}))


def test_what_is_shown() -> None:
    found = export(**{"fc.weight": torch.tensor([1.0, 2.5]), "d2t": torch.zeros(2)})
    assert [str(item) for item in differences(found, export())] == [
        "d2t is float32 [2], expected float32 [3]",
        "fc.weight is 2.5 at 1 (1 of 2 values differ), expected 1",
    ]
    lacking = Export(
        config=CONFIG, weights={k: v for k, v in export().weights.items() if k != "d2t"}
    )
    assert [str(d) for d in differences(lacking, export())] == [
        "d2t is nothing, expected float32 [3]"
    ]


def test_the_method_s_causes_come_first_in_its_order() -> None:
    found = Export(config={**CONFIG, "block_size": 2, "rms_norm_eps": 1.0}, weights={})
    own = ["draft tokens mean others", "it drafts more or fewer"]
    assert causes(found) == [*own, "norms", "norms", "weights"]
    assert isinstance(differences(found, export())[0], Difference)


def test_a_repaired_copy_is_served_as_a_fresh_export() -> None:
    fresh = replace(export(), serve={"engine": {"flag": 1}}, files={"notes.txt": b"read me"})
    repaired = repair(Export(config={}, weights={}), fresh, {"weights"})
    assert (repaired.serve, repaired.files) == (fresh.serve, fresh.files)
