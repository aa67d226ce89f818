"""Apply a step's gradients, or leave weights and optimizers as they are when it is a bad one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from .metrics import Reduced


@dataclass(frozen=True, slots=True)
class Update:
    """Clips the gradients and steps the optimizers, if loss and gradient norm are finite.

    What is finite is decided on the device.  An optimizer that takes torch's `found_inf` (a
    fused AdamW) is told of it there, and the host waits for nothing; with any other (Muon) the
    host waits for the answer and then leaves the step out.
    """

    optimizers: list[Optimizer]
    max_grad_norm: float
    ranks: int
    replicas: int = 1  # ranks that hold the same part of a gradient

    def apply(self, gradients: list[Tensor], reduced: Reduced) -> None:
        """Use `gradients` (this rank's parts) and drop them.

        FSDP averaged them over the ranks; the loss is a sum over all of them, divided once by
        `reduced.weight`.  `reduced.last` is the sum of their squares.
        """
        norm = reduced.last.sqrt() * self.ranks / reduced.weight
        # without a weight nothing is supervised, and the norm is no number
        numbers = torch.stack([reduced.loss, reduced.weight, norm])
        unusable = ~numbers.isfinite().all()
        if all(map(_takes_found_inf, self.optimizers)):
            found_inf = unusable.float()
        elif unusable:
            self._drop_gradients()
            return
        else:
            found_inf = None
        clipping = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, (clipping * self.ranks / reduced.weight).float())
        for optimizer in self.optimizers:
            _tell(optimizer, found_inf)
            optimizer.step()
            _tell(optimizer, None)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def grad_norm(square: float, weight: float, ranks: int) -> float:
    """Return the norm of the mean loss's gradient from the sum of squares of the summed one's."""
    return math.sqrt(square) * ranks / weight if weight else 0.0


def _takes_found_inf(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _tell(optimizer: Optimizer, found_inf: Tensor | None) -> None:
    if _takes_found_inf(optimizer):  # as torch.amp.GradScaler does
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
