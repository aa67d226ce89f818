"""The suite that every method has to pass, and this one's own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from specforge_core.testing.case import Case
from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    """Points of the contract; override one only with a stricter one."""

    strategy: ClassVar[dict[str, Any]] = {"name": "example"}
    other_shape: ClassVar[dict[str, Any]] = {"draft_tokens": 2}


def test_the_loss_is_that_of_plain_cross_entropy(tmp_path: Path, toy_target: Path) -> None:
    case = Case.open({"name": "example"}, toy_target, tmp_path)
    assert case.draft.frozen is not None
    head = case.draft.frozen.state_dict()["weight"].double()
    blocks = [weight.double() for weight in case.draft.model.state_dict().values()]
    for sample in case.samples:
        ids, mask = sample["input_ids"], sample["loss_mask"]
        wanted, count = torch.zeros((), dtype=torch.float64), 0
        for place, state in enumerate(sample["final"].double()):
            for token, block in enumerate(blocks, place + 2):
                if token < len(ids) and mask[token]:
                    inner = state + torch.nn.functional.silu(block @ state)
                    wanted -= (head @ inner).log_softmax(0)[ids[token]]
                    count += 1
        output = case.step([sample])
        assert output.weight == count
        torch.testing.assert_close(output.loss_sum.double(), wanted, rtol=1e-5, atol=0)
