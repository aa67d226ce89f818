"""Gradients of weights that several steps use, against autograd's of the plain form."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from specforge_eagle3.summed import Tapped, Use, linear
from torch import Tensor

from specforge_core.float8 import quantise_weight


def run(weights: list[Tensor], x: Tensor, *, tapped: bool, float8: bool = False) -> list[Tensor]:
    """Feed a layer of two products its own output three times; return all gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*weights, x)]
    up, down, state = leaves
    both = Tapped(len(x), up, down, in_float8=float8) if tapped else None
    narrow = [quantise_weight(weight) if float8 else None for weight in (up, down)]
    found = []
    for _ in range(3):
        step = None
        uses: Sequence[Use | None] = (None, None)
        if both is not None:
            step, taps = both.step()
            uses = tuple(zip(narrow, taps, strict=True))
        inner = F.silu(linear(state, up, uses[0]))
        out = state + linear(inner, down, uses[1])
        if step is not None:
            step.inputs = (state.detach(), inner.detach())
        state = out
        found.append(out)
    loss = sum((i + 1) * states.square().sum() for i, states in enumerate(found))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves))


def test_gradients_are_those_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    up, down, x = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((7, 5), (5, 7), (9, 5))
    )
    plain = run([up, down], x, tapped=False)
    found = run([up, down], x, tapped=True)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [9, 32])
def test_in_float8_they_are_near_and_summed_over_all_steps_at_once(rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    up, down, x = (
        torch.randn(shape, generator=draw) / 4 for shape in ((48, 32), (32, 48), (rows, 32))
    )
    plain = run([up, down], x, tapped=True)
    found = run([up, down], x, tapped=True, float8=True)
    for one, other in zip(found, plain, strict=True):
        error = float((one - other).norm() / other.norm())
        assert 0.005 < error < 0.1  # a number in float8 is off by up to 6 %, at random


def test_what_is_frozen_gets_no_gradient() -> None:
    weight, x = torch.ones(3, 2), torch.ones(4, 2, requires_grad=True)
    _, (tap,) = Tapped(4, weight).step()
    torch.autograd.backward(linear(x, weight, (None, tap)).sum())
    assert weight.grad is None
    assert x.grad is not None
    assert bool((x.grad == 3).all())
