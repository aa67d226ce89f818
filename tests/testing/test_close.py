"""The tolerance of the tests itself: rounding passes, a mistake does not."""

from __future__ import annotations

import pytest
import torch

from specforge_core.testing.close import close, rounding

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 32, 3000])
@pytest.mark.parametrize("order", [1, -1])
def test_sums_in_any_order_are_close(dtype: torch.dtype, terms: int, order: int) -> None:
    gen = torch.Generator().manual_seed(terms)
    parts = torch.randn(terms, 50, generator=gen).to(dtype)
    total = torch.zeros(50, dtype=dtype)
    for row in (
        parts if order > 0 else parts.flip(0)
    ):  # one after the other: the worst order there is
        total = total + row
    close(total, parts.double().sum(0), terms=terms, scale=parts.double().abs().sum(0))


@pytest.mark.parametrize("terms", [1, 32, 3000])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_error_of_one_in_a_thousand_is_seen_in_float32(terms: int, sign: int) -> None:
    want = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    close(want, want, terms=terms)
    with pytest.raises(AssertionError, match=r"of 320 differ; value \d+ is .* allowed"):
        close(want * (1 + sign * 1e-3), want, terms=terms)
    wrong = want.clone()
    wrong[3, 4] += sign * 1e-3 * float(want.abs().max())
    with pytest.raises(AssertionError, match="losses: 1 of 320 differ; value 28 is"):
        close(wrong, want, terms=terms, name="losses")
    with pytest.raises(AssertionError):
        close(2.5 * (1 + sign * 1e-3), 2.5, terms=terms, dtype=torch.float32)


def test_each_float_is_measured_by_its_own_size() -> None:
    close([1e6, 1e-6], [1e6, 1e-6 * (1 + 1e-15)], terms=1)
    with pytest.raises(AssertionError, match="1 of 2 differ; value 1"):
        close([1e6, 1e-6], [1e6, 1.001e-6], terms=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_close(value: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2 differ; value 1"):
        close(torch.tensor([1.0, value]), torch.ones(2), terms=10**9)


def test_other_shapes_are_not_close() -> None:
    with pytest.raises(AssertionError, match="shape"):
        close(torch.ones(2), torch.ones(1), terms=1)


def test_the_tolerance_follows_the_dtype_and_the_length() -> None:
    assert rounding(torch.float32, 400) == 2 * rounding(torch.float32, 100)
    assert rounding(torch.bfloat16, 1) == 2**16 * rounding(torch.float32, 1)


def test_whole_numbers_are_equal_or_not() -> None:
    close(torch.tensor([3, 5]), torch.tensor([3, 5]), terms=10**6)
    with pytest.raises(AssertionError, match="value 1 is 4"):
        close(torch.tensor([3, 4]), torch.tensor([3, 5]), terms=10**6)
