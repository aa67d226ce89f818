"""Samples: what is asked of the target, stored, skipped and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash.adapter import DFlashAdapter

from specforge_core.errors import DataError
from specforge_core.types import TargetCapture


def capture(mask: list[int], token: int = 7) -> TargetCapture:
    tokens = len(mask)
    states = {i: torch.full((tokens, 24), float(i)) for i in (1, 5)}
    ids = torch.arange(tokens)
    ids[-1] = token
    return TargetCapture(index=3, input_ids=ids, loss_mask=torch.tensor(mask), hidden_states=states)


@pytest.fixture
def adapter(kit: Any) -> DFlashAdapter:
    return DFlashAdapter.build(kit.config(), kit.target())


def test_layers_lie_side_by_side_in_order(adapter: DFlashAdapter) -> None:
    assert adapter.spec.layers == (1, 5)
    assert adapter.spec.final == "none"
    sample = adapter(capture([0, 1, 1]))
    assert sample is not None
    assert sample["hidden_states"][2].tolist() == [1.0] * 24 + [5.0] * 24
    for name, field in adapter.spec.fields.items():
        assert str(sample[name].dtype) == f"torch.{field.dtype}"
        assert tuple(sample[name].shape)[1:] == field.shape[1:]
    assert sample.keys() == adapter.spec.fields.keys()


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 1], [0, 0, 1], [1]])
def test_samples_without_two_consecutive_supervised_tokens_are_skipped(
    adapter: DFlashAdapter, mask: list[int]
) -> None:
    assert adapter(capture(mask)) is None


def test_the_mask_token_in_the_data_is_an_error(adapter: DFlashAdapter) -> None:
    with pytest.raises(DataError, match=r"sample 3 contains token 40.*mask_token_id=null"):
        adapter(capture([0, 1, 1], token=40))
