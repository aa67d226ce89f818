from __future__ import annotations

import pytest
import torch

from specforge_core.capture.verify import check_sample
from specforge_core.types import CaptureSpec, Field, Sample

from ..captured import identity

IDENTITY = identity()
TOKENS = Field(shape=(None,), dtype="int64")
SPEC = CaptureSpec(
    layers=(1,),
    final="none",
    fields={
        "input_ids": TOKENS,
        "loss_mask": TOKENS,
        "hidden": Field(shape=(None, 4), dtype="float32"),
    },
)


def sample(**changes: torch.Tensor) -> Sample:
    ids = torch.tensor([0, 5, 99])
    good = {"input_ids": ids, "loss_mask": torch.tensor([0, 1, 1]), "hidden": torch.ones(3, 4)}
    return {**good, **changes}


def test_a_good_sample_has_no_problems():
    assert check_sample(SPEC, IDENTITY, sample()) == []


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
    assert [str(p) for p in check_sample(SPEC, IDENTITY, sample(**changes))] == [message]
