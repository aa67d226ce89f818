"""What every strategy has to do, done by this one."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "domino",
        "block_size": 4,
        "num_layers": 1,
        "num_capture_layers": 2,
        "num_anchors": 64,
        "gru_hidden_dim": 12,
        "emb_dim": 8,
    }
    other_shape = {"emb_dim": 6}  # noqa: RUF012
