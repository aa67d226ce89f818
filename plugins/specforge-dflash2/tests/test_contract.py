"""What every strategy has to do, done by this one."""

from __future__ import annotations

from pathlib import Path

from specforge_core.testing.case import Case
from specforge_core.testing.contract import StrategyContract
from specforge_core.testing.float8 import check_float8
from specforge_core.testing.toy import save_toy_target


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "dflash2",
        "block_size": 4,
        "num_layers": 1,
        "num_capture_layers": 2,
        "num_anchors": 64,
        "conv_group_size": 8,
        "selector_rank": 8,
        "selector_top_k": 4,
    }
    other_shape = {"selector_rank": 4}  # noqa: RUF012


def test_a_head_in_float8_is_near_the_one_that_is_not(tmp_path: Path) -> None:
    # the suite's target has a head of 260 tokens, no multiple of 16
    save_toy_target(tmp_path / "target", tie_word_embeddings=False, vocab_size=272)
    check_float8(Case.open(TestContract.strategy, tmp_path / "target", tmp_path))
