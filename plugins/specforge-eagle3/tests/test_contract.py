"""What every strategy has to do, done by this one: in chains, and in trees."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {"name": "eagle3", "layers": [0, 2, 4], "draft_vocab_size": 96}  # noqa: RUF012
    other_shape = {"num_heads": 2, "head_dim": 16}  # noqa: RUF012


class TestTreeContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "eagle3",
        "layers": [0, 2, 4],
        "draft_vocab_size": "full",
        "tree_top_k": 3,
        "tree_tokens": 12,
    }
