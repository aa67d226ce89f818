"""Acceptance lengths, their bounds, and what counts as a difference."""

from __future__ import annotations

import math
import random

import pytest
from specforge_doctor.stats import Measurement, Tally, compare, student

from specforge_core.testing.close import close


def measured(name: str, *parts: tuple[float, float]) -> Measurement:
    return Measurement(name, tuple(Tally(*part) for part in parts))


def test_the_mean_is_over_verifications() -> None:
    found = measured("a", (30, 10), (10, 10), (0, 0))
    assert found.value == 2
    assert measured("b", (0, 0), (0, 0)).value is None


def test_equal_numbers_agree_however_few() -> None:
    pair = compare(measured("a", (30, 10), (10, 9)), measured("b", (30, 10), (10, 9)))
    assert (pair.difference, pair.bound, pair.differs) == (0, 0, False)


def test_three_percent_is_allowed() -> None:
    left = measured("a", *[(200, 100)] * 4)
    assert not compare(left, measured("b", *[(205, 100)] * 4)).differs
    assert compare(left, measured("b", *[(207, 100)] * 4)).differs
    assert compare(left, measured("b", *[(193, 100)] * 4)).differs


def test_a_large_difference_of_two_prompts_may_be_chance() -> None:
    left = measured("a", (30, 10), (30, 10))
    pair = compare(left, measured("b", (36, 10), (30, 10)))
    close(pair.difference, 0.1, terms=4)
    assert pair.bound is not None
    assert pair.bound > 0.5
    assert not pair.differs


def test_what_was_refused_differs() -> None:
    refused = Measurement("b", (), refused="no")
    pair = compare(measured("a", (3, 1), (3, 1)), refused)
    assert (pair.difference, pair.bound, pair.differs) == (None, None, True)
    assert compare(measured("a", (3, 1)), measured("b", (0, 0))).differs


@pytest.mark.parametrize(("degrees", "point"), [(3, 3.182), (7, 2.365), (49, 2.010)])
def test_students_t(degrees: int, point: float) -> None:
    # the points of a printed table, against an expansion that is near enough for a report
    assert student(degrees) == pytest.approx(point, rel=0.01)
    assert student(10**9) == pytest.approx(1.95996, rel=1e-5)  # as many digits as are given


def test_the_bound_holds_the_truth_19_times_in_20() -> None:
    draw = random.Random(0)

    def sample(mean: float) -> Measurement:
        rounds = [draw.randint(5, 40) for _ in range(12)]
        return measured("a", *[(draw.gauss(mean, 0.6) * n, n) for n in rounds])

    held = 0
    for _ in range(400):
        pair = compare(sample(2.5), sample(2.5))
        assert pair.difference is not None
        assert pair.bound is not None
        held += abs(pair.difference) <= pair.bound
    assert 0.92 < held / 400 < 0.98


def test_one_prompt_says_nothing() -> None:
    assert measured("a", (3, 1)).bound == math.inf
