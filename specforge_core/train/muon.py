"""Muon for a machine on which bfloat16 is slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

WIDE = 1.5  # from here on iterations on the Gram matrix alone are cheaper


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return a matrix [m, n] near `matrix`'s orthogonal factor, by Newton-Schulz iterations.

    Every singular value becomes about 1.  Computed in the matrix's own dtype.
    """
    a, b, c = coefficients
    x: Tensor = matrix.T if matrix.size(0) > matrix.size(1) else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    wide = x.size(1) >= WIDE * x.size(0)
    gram: Tensor = x @ x.T
    product: Tensor | None = None
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        if wide:  # all factors are polynomials in one Gram matrix, so they commute
            product = polynomial if product is None else polynomial @ product
            gram = polynomial @ gram @ polynomial if step + 1 < steps else gram
        else:
            x = polynomial @ x
            gram = x @ x.T if step + 1 < steps else gram
    x = x if product is None else product @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its iterations in float32 instead of bfloat16.

    On a CPU without instructions for bfloat16 those take 25 times as long: several seconds for
    one matrix of 576 x 576.  State and options are torch's, so checkpoints fit both.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        ahead = param.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        # every rank iterates on the whole matrix and keeps its own rows
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        update = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"])
        if isinstance(ahead, DTensor):
            everywhere = [Replicate()] * ahead.device_mesh.ndim
            update = DTensor.from_local(update, ahead.device_mesh, everywhere, run_check=False)
            update = update.redistribute(placements=ahead.placements)
        stretch = math.sqrt(max(1.0, param.size(0) / param.size(1)))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * stretch)
