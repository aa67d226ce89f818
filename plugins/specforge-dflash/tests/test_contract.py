"""What every strategy has to do, done by this one."""

from __future__ import annotations

import pytest

from specforge_core.deep import check_deep
from specforge_core.errors import ConfigError
from specforge_core.testing.contract import StrategyContract


class TestContract(StrategyContract):
    strategy = {  # noqa: RUF012
        "name": "dflash",
        "block_size": 4,
        "num_layers": 1,
        "num_capture_layers": 2,
        "num_anchors": 64,
    }
    other_shape = {"num_layers": 2}  # noqa: RUF012


@pytest.mark.slow
class TestJetSpecContract(StrategyContract):
    """Blocks as JetSpec's, the target's own choices as labels, and a sample in each row."""

    strategy = {  # noqa: RUF012
        **TestContract.strategy,
        "causal": True,
        "loss": "kl",
        "weighting": "uniform",
        "labels": "target",
        "batches": "padded",
    }


def test_options_that_do_not_fit_the_suites_target_are_told_before_it_begins() -> None:
    with pytest.raises(ConfigError, match=r"toy target: 5 default layers .*num_capture_layers=3"):
        check_deep("dflash", ())
