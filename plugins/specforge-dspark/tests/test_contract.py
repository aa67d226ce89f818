"""What every strategy has to do, done by this one."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "dspark",
        "block_size": 4,
        "num_layers": 1,
        "num_capture_layers": 2,
        "num_anchors": 64,
        "markov_head": "rnn",
        "markov_rank": 8,
    }
    other_shape = {"num_layers": 2}  # noqa: RUF012
