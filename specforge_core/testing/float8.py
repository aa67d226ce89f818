"""A step with `train.precision: fp8` against one without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..float8 import FLOAT8, to_float8
from ..types import Sample
from .case import CPU, Case

LOSS = 0.05  # relative: a product is off by 2 to 4 % at random, and a loss sums rows
NEAR = 0.99  # cosine of both gradients: a number in float8 is off by up to 6 %, at random


def check_float8(case: Case) -> None:
    """Assert that a step's loss and gradient stay near, or that the draft is refused for fp8."""
    exact, wanted = _step(case)
    refusal = ""
    try:
        to_float8(case.draft, CPU)
    except ConfigError as exc:
        refusal = str(exc)
    if refusal:
        assert "Try: train.precision=null" in refusal
        return
    rounded, found = _step(case)
    torch.testing.assert_close(rounded, exact, rtol=LOSS, atol=LOSS)
    assert not torch.equal(found, wanted), "no product is in float8"
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
    assert cosine > NEAR, f"the gradients' cosine is {float(cosine):.4f}"


def _step(case: Case) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of a step on all samples."""
    weights = [p for p in case.draft.model.parameters() if p.requires_grad]
    loss = case.step(case.samples).loss_sum
    found = torch.autograd.grad(loss, weights, materialize_grads=True)
    return loss.detach(), torch.cat([gradient.flatten() for gradient in found])


def saved_float8(case: Case, samples: Sequence[Sample]) -> int:
    """Return the bytes of float8 that a step on samples keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.dtype == FLOAT8:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = case.step(samples)  # what it keeps is there until `out` is gone
    assert out.loss_sum.requires_grad
    return sum(kept.values())
