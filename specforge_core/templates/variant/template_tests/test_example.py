"""The suite that every method has to pass, and what this variant does otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from specforge_core.testing.case import Case
from specforge_core.testing.contract import StrategyContract

OPTIONS: dict[str, Any] = {  # that suit a target of 6 layers and 260 tokens
    "name": "example",
    # PARENT_OPTIONS
}


class TestContract(StrategyContract):
    """Points of the contract; override one only with a stricter one."""

    strategy: ClassVar[dict[str, Any]] = OPTIONS


def test_later_tokens_of_a_sample_are_not_trained(tmp_path: Path, toy_target: Path) -> None:
    whole = Case.open(OPTIONS, toy_target, tmp_path / "whole")
    short = Case.open({**OPTIONS, "trained_tokens": 3}, toy_target, tmp_path / "short")
    for capture in whole.captures:
        one, other = whole.sample(capture), short.sample(capture)
        assert one is not None
        assert other is not None
        places = one["loss_mask"].nonzero().flatten()
        assert len(places) > 3
        assert other["loss_mask"].nonzero().flatten().tolist() == places[:3].tolist()
