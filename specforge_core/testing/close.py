"""Whether numbers are equal up to the rounding that their dtype and their sums' length allow.

Another processor sums in another order.  So a tolerance follows from what is computed,
never from what one machine happened to give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = Tensor | float | Sequence[float]
FACTOR = 8.0


def rounding(dtype: torch.dtype, terms: int, factor: float = FACTOR) -> float:
    """Return how far a sum of `terms` products may be off, over the size of what is summed.

    Rounding errors have either sign, so they grow with the square root of their number.
    Whole numbers are not rounded.
    """
    if not dtype.is_floating_point:
        return 0.0
    return factor * torch.finfo(dtype).eps * math.sqrt(max(terms, 1))


def close(
    actual: Values,
    expected: Values,
    *,
    terms: int,
    factor: float = FACTOR,
    dtype: torch.dtype | None = None,
    scale: Values | None = None,
    name: str = "values",
) -> None:
    """Assert that `actual` is `expected` but for rounding.

    `terms` is how many products the longest chain of sums behind a value adds up: the
    sum of the widths that a network multiplies by, layer after layer.  `dtype` is the narrowest
    it was computed in, by default that of `actual`; Python's floats are float64.
    `scale` is the size of what was summed, one number or one per value: the sum of
    absolute values where large parts cancel.  By default it is the largest expected value of a
    tensor, as parts of its small values may be as large, and each value's own size for floats.
    `factor` allows for several operations in a row; say why where it is not the default.
    Raises AssertionError naming the worst value, and what was allowed.
    """
    found, want = _wide(actual), _wide(expected)
    assert found.shape == want.shape, f"{name}: shape {found.shape}, expected {want.shape}"
    if dtype is None:
        dtype = actual.dtype if isinstance(actual, Tensor) else torch.float64
    if not want.numel():
        return
    size = want.abs()
    if scale is not None:
        size = _wide(scale).abs()
    elif isinstance(expected, Tensor):
        size = size.max()
    allowed = (rounding(dtype, terms, factor) * size).expand(want.shape).flatten()
    apart = (found - want).abs().flatten()
    bad = ~(apart <= allowed)  # also where either is not a number
    if not bad.any():
        return
    excess = (apart / allowed.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(math.inf)
    worst = int(excess.argmax())
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {want.numel()} differ; value {worst} is "
        f"{float(found.flatten()[worst]):.9g}, expected {float(want.flatten()[worst]):.9g}: "
        f"{float(apart[worst]):.3g} apart, {float(allowed[worst]):.3g} allowed"
    )


def _wide(values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64)
    return torch.tensor(values, dtype=torch.float64)
