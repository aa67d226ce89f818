"""What every strategy has to do, done by this one."""

from __future__ import annotations

from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "peagle",
        "layers": [0, 2, 4],
        "draft_vocab_size": 96,
        "num_layers": 2,
        "depths": 4,
        "keep_ratio": 1,  # so that acceptance is simulated at every place
    }
    other_shape = {"num_layers": 1}  # noqa: RUF012
