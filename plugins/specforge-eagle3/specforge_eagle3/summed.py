"""Gradients of weights that every step uses, added up by the products that make them.

Left to autograd, each step's gradient of a weight is a tensor of its own, and adding up those of
R steps reads and writes all weights R - 1 times more.  Here a step's product with a weight takes
the weight as a constant, and adds a zero, the tap.  The tap's gradient is that of the product, so
with the product's input it gives the weight's, which is added to what other steps gave in the
same call.  Shapes: N tokens, I and O the sizes of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, tap: Tensor | None = None) -> Tensor:
    """Return x [N, I] by weight [O, I]; with a tap [N, O] the weight's gradient is made there."""
    return F.linear(x, weight) if tap is None else F.linear(x, weight.detach()) + tap


class Tapped:
    """Weights that several steps over N tokens use, in one forward and backward pass."""

    def __init__(self, count: int, *weights: Tensor) -> None:
        zero = weights[0].new_zeros(())
        self.zeros = [zero.expand(count, len(weight)) for weight in weights]
        self.totals: list[Tensor | None] = [None] * len(weights)
        self.end: Tensor = _End.apply(self, *weights)  # type: ignore[no-untyped-call]

    def step(self) -> tuple[Step, tuple[Tensor, ...]]:
        """Return one more step, and its taps."""
        step = Step(self)
        taps: tuple[Tensor, ...] = _Taps.apply(step, self.end)  # type: ignore[no-untyped-call]
        return step, taps


class Step:
    """One use of each weight.  `inputs` [N, I] are set once they are there, before the backward.

    The taps' graph holds this, so this does not hold the taps.
    """

    def __init__(self, tapped: Tapped) -> None:
        self.tapped = tapped
        self.inputs: Sequence[Tensor] = ()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add this step's part to the weights' gradients, from those of the products [N, O]."""
        totals = self.tapped.totals
        for place, (gradient, x) in enumerate(zip(gradients, self.inputs, strict=True)):
            total = totals[place]
            if total is None:
                totals[place] = gradient.t() @ x
            else:
                total.addmm_(gradient.t(), x)
        self.inputs = ()


class _End(torch.autograd.Function):
    """Begins before all steps, so that its backward is called when all of theirs were."""

    @staticmethod
    def forward(ctx: Any, tapped: Tapped, *weights: Tensor) -> Tensor:
        ctx.tapped = tapped
        return weights[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        totals, ctx.tapped.totals = ctx.tapped.totals, []
        return None, *totals


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, end: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(end)
        return tuple(zero.detach() for zero in step.tapped.zeros)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.step.add(gradients)
        return None, ctx.saved_tensors[0]
