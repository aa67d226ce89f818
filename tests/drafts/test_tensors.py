"""What packages of methods share when they write and compare exports."""

from __future__ import annotations

import pytest
import torch

from specforge_core.drafts.tensors import check_options, written
from specforge_core.errors import CheckpointError


def test_only_real_numbers_are_written_in_the_dtype() -> None:
    given = {"a": torch.ones(2, 3, requires_grad=True).t(), "d2t": torch.tensor([1, 2])}
    found = written(given, "bfloat16")
    assert found["a"].dtype == torch.bfloat16
    assert found["a"].is_contiguous()
    assert not found["a"].requires_grad
    assert found["d2t"].dtype == torch.int64


def test_the_first_difference_names_what_to_type() -> None:
    check_options({"num_layers": (2, 2)}, {"vocab_size": (9, 9)})
    with pytest.raises(CheckpointError, match=r"Try: strategy\.num_layers=3"):
        check_options({"num_layers": (3, 2)}, {"vocab_size": (8, 9)})
    with pytest.raises(CheckpointError, match=r"vocab_size 8, this run 9.*target\.path"):
        check_options({"num_layers": (2, 2)}, {"vocab_size": (8, 9)})


def test_what_to_type_is_one_word_and_has_a_value() -> None:
    with pytest.raises(CheckpointError, match=r"Try: strategy\.layers=\[1,5\]$"):
        check_options({"layers": ([1, 5], [2, 6])})
    with pytest.raises(CheckpointError, match=r"does not say heads, which is 4 .*\. Add it there"):
        check_options({"heads": (None, 4)})
