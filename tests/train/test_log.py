"""What a running step's display says of the steps before it."""

from __future__ import annotations

import math

import pytest

from specforge_core.train.log import Log, Phases
from specforge_core.train.metrics import Sums


@pytest.mark.parametrize("every", [1, 2])
def test_loss_and_rate_are_shown_right_behind_a_line_too(every: int) -> None:
    log = Log(every, None, Phases(exact=False))
    assert math.isnan(log.loss)
    for step, loss in ((1, 6.0), (2, 2.0)):
        log.window.merge(Sums({"loss": (2 * loss, 2.0)}))
        log.line(step, {"tokens": 10.0 * step, "tokens_per_second": 7.0})
        if step % every == 0:
            assert log.rate(10 * step) == 7.0
        assert log.loss == (loss if every == 1 else {1: 6.0, 2: 4.0}[step])
    log.window.merge(Sums({"loss": (1.0, 2.0)}))
    assert log.loss == 0.5
    assert log.rate(25) > 7.0  # 5 tokens in less than 5 / 7 s
