"""Gradients of weights that several steps use, against autograd's of the plain form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_eagle3.summed import Tapped, linear
from torch import Tensor


def run(weights: list[Tensor], x: Tensor, *, tapped: bool) -> list[Tensor]:
    """Feed a layer of two products its own output three times; return all gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*weights, x)]
    up, down, state = leaves
    both = Tapped(len(x), up, down) if tapped else None
    found = []
    for _ in range(3):
        step, taps = (None, (None, None)) if both is None else both.step()
        inner = F.silu(linear(state, up, taps[0]))
        out = state + linear(inner, down, taps[1])
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


def test_what_is_frozen_gets_no_gradient() -> None:
    weight, x = torch.ones(3, 2), torch.ones(4, 2, requires_grad=True)
    _, taps = Tapped(4, weight).step()
    torch.autograd.backward(linear(x, weight, taps[0]).sum())
    assert weight.grad is None
    assert x.grad is not None
    assert bool((x.grad == 3).all())
