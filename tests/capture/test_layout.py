from __future__ import annotations

import pytest
import torch

from specforge_core.capture.layout import check_sample, layout_problems, non_finite, num_tokens
from specforge_core.types import CaptureSpec, Field, Sample

FIELDS = {
    "input_ids": Field(shape=(None,), dtype="int64"),
    "hidden": Field(shape=(None, 4), dtype="bfloat16"),
    "scale": Field(shape=(), dtype="float32"),
}


def sample(**changes: torch.Tensor) -> Sample:
    good = {
        "input_ids": torch.arange(3),
        "hidden": torch.zeros(3, 4, dtype=torch.bfloat16),
        "scale": torch.tensor(1.0),
    }
    return {**good, **changes}


def test_a_sample_as_the_spec_says_has_no_problems():
    assert layout_problems(FIELDS, sample()) == []
    assert num_tokens(FIELDS, sample()) == 3
    assert num_tokens({"scale": FIELDS["scale"]}, sample()) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.zeros(3, 4)}, "field 'hidden': is float32, the spec says bfloat16. Cast"),
        (
            {"hidden": torch.zeros(3, 5, dtype=torch.bfloat16)},
            "field 'hidden': has shape [3, 5], the spec says ['tokens', 4]",
        ),
        (
            {"hidden": torch.zeros(3, dtype=torch.bfloat16)},
            "field 'hidden': has shape [3], the spec says ['tokens', 4]",
        ),
        (
            {"input_ids": torch.arange(4)},
            "sample: fields differ in their number of tokens: hidden 3, input_ids 4",
        ),
        ({"extra": torch.zeros(3)}, "field 'extra': is not in the capture spec. Declare it"),
    ],
)
def test_each_problem_is_named(wrong: Sample, message: str):
    (problem,) = layout_problems(FIELDS, sample(**wrong))
    assert str(problem).startswith(message)


def test_a_missing_field_is_named():
    partial = sample()
    del partial["hidden"]
    (problem,) = layout_problems(FIELDS, partial)
    assert str(problem).startswith("field 'hidden': is not in the sample. Return it")


def test_non_finite_fields_are_found_and_large_sums_are_not():
    assert non_finite(sample(scale=torch.tensor(float("inf")))) == ["scale"]
    assert non_finite(sample(hidden=torch.tensor([[float("nan")] * 4] * 3))) == ["hidden"]
    assert non_finite({"x": torch.full((4,), 3e38)}) == []


# ---- a whole sample ----

VOCAB_SIZE = 100
TOKEN_AXIS = Field(shape=(None,), dtype="int64")
SPEC = CaptureSpec(
    layers=(1,),
    final="none",
    fields={
        "input_ids": TOKEN_AXIS,
        "loss_mask": TOKEN_AXIS,
        "hidden": Field(shape=(None, 4), dtype="float32"),
    },
)


def whole(**changes: torch.Tensor) -> Sample:
    ids = torch.tensor([0, 5, 99])
    good = {"input_ids": ids, "loss_mask": torch.tensor([0, 1, 1]), "hidden": torch.ones(3, 4)}
    return {**good, **changes}


def test_a_good_sample_has_no_problems():
    assert check_sample(SPEC, VOCAB_SIZE, whole()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": torch.tensor([0, 5, 100])},
            "field 'input_ids': has values 0 to 100, allowed are 0 to 99",
        ),
        (
            {"input_ids": torch.tensor([-100, 5, 9])},
            "field 'input_ids': has values -100 to 9, allowed are 0 to 99",
        ),
        (
            {"loss_mask": torch.tensor([0, 2, 1])},
            "field 'loss_mask': has values 0 to 2, allowed are 0 to 1",
        ),
        ({"hidden": torch.full((3, 4), float("nan"))}, "field 'hidden': holds NaN or infinity"),
        (
            {"hidden": torch.ones(2, 4)},
            "sample: fields differ in their number of tokens: hidden 2, input_ids 3, loss_mask 3",
        ),
        (
            {"hidden": torch.ones(3, 4).half()},
            "field 'hidden': is float16, the spec says float32. Cast it in the strategy's adapter",
        ),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(changes: Sample, message: str):
    assert [str(p) for p in check_sample(SPEC, VOCAB_SIZE, whole(**changes))] == [message]
