"""What every strategy has to do, done by this one."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


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
