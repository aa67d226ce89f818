"""Gradients of weights that every step uses, added up by the products that make them.

Left to autograd, each step's gradient of a weight is a tensor of its own, and adding up those of
R steps reads and writes all weights R - 1 times more.  Here a step's product with a weight takes
the weight as a constant, and adds a zero, the tap.  The tap's gradient is that of the product, so
with the product's input it gives the weight's, which is added to what other steps gave in the
same call.  In float8, whose kernels do not add, one product behind all steps sums over the tokens
of all of them.  Shapes: N tokens, I and O the sizes of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from specforge_core.float8 import Float8Weight, by_columns, linears, multiply, product

Use: TypeAlias = "tuple[Float8Weight | None, Tensor]"  # of a weight in a step: in float8, the tap


def linear(x: Tensor, weight: Tensor, use: Use | None = None) -> Tensor:
    """Return x [N, I] by weight [O, I]; with a use, whose tap is [N, O], that is a constant."""
    if use is None:
        return F.linear(x, weight)
    narrow, tap = use
    return (F.linear(x, weight.detach()) if narrow is None else product(x, narrow)) + tap


def multiplied(x: Tensor, uses: Sequence[Use], *layers: nn.Linear) -> Sequence[Tensor]:
    """Return what layers give for one input [N, I]; with uses of their weights, as constants.

    There is a use for each weight, or one for all below each other.
    """
    if not uses:
        return linears(x, *layers)
    outs = [linear(x, layer.weight, use) for layer, use in zip(layers, uses, strict=False)]
    if len(outs) == len(layers):
        return outs
    return torch.split(outs[0], [layer.out_features for layer in layers], -1)


class Tapped:
    """Weights that several steps over N tokens use, in one forward and backward pass."""

    def __init__(self, count: int, *weights: Tensor, in_float8: bool = False) -> None:
        zero = weights[0].new_zeros(())
        self.zeros = [zero.expand(count, len(weight)) for weight in weights]
        self.totals: list[Tensor | None] = [None] * len(weights)
        self.in_float8 = in_float8  # then what the products are to sum over is kept of each step
        self.steps: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
        self.end: Tensor = _End.apply(self, *weights)  # type: ignore[no-untyped-call]

    def step(self) -> tuple[Step, tuple[Tensor, ...]]:
        """Return one more step, and its taps."""
        step = Step(self)
        taps: tuple[Tensor, ...] = _Taps.apply(step, self.end)  # type: ignore[no-untyped-call]
        return step, taps

    def finish(self) -> list[Tensor | None]:
        """Return the weights' gradients, once all steps gave their part."""
        if self.steps:
            gradients, inputs = (
                list(zip(*side, strict=True)) for side in zip(*self.steps, strict=True)
            )
            self.steps = []
            # the smallest first: less is left when the largest are put below each other
            for place in sorted(range(len(gradients)), key=lambda i: gradients[i][0].shape[1]):
                dtype, lines = gradients[place][0].dtype, []
                for side in (gradients, inputs):
                    whole, side[place] = torch.cat(side[place]), ()
                    lines.append(by_columns(whole))
                    del whole
                self.totals[place] = multiply(*lines).to(dtype)
        totals, self.totals = self.totals, []
        return totals


class Step:
    """One use of each weight.  `inputs` [N, I] are set once they are there, before the backward.

    The taps' graph holds this, so this does not hold the taps.
    """

    def __init__(self, tapped: Tapped) -> None:
        self.tapped = tapped
        self.inputs: Sequence[Tensor] = ()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add this step's part to the weights' gradients, from those of the products [N, O]."""
        totals, inputs, self.inputs = self.tapped.totals, self.inputs, ()
        if self.tapped.in_float8:
            self.tapped.steps.append((gradients, inputs))
            return
        for place, (gradient, x) in enumerate(zip(gradients, inputs, strict=True)):
            total = totals[place]
            if total is None:
                totals[place] = gradient.t() @ x
            else:
                total.addmm_(gradient.t(), x)


class _End(torch.autograd.Function):
    """Begins before all steps, so that its backward is called when all of theirs were."""

    @staticmethod
    def forward(ctx: Any, tapped: Tapped, *weights: Tensor) -> Tensor:
        ctx.tapped = tapped
        return weights[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.tapped.finish()


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
