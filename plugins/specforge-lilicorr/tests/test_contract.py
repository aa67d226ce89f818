"""What every strategy has to do, done by this one."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "lilicorr",
        "block_size": 3,
        "num_layers": 1,
        "num_capture_layers": 2,
        "num_anchors": 64,
        "candidate_top_k": 48,
        "lattice_hidden_size": 16,
        "lattice_layers": 1,
        "lattice_heads": 2,
        "factor_dim": 8,
        "margin_weight": 0.125,
    }
    other_shape = {"factor_dim": 4}  # noqa: RUF012
