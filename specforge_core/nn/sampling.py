"""How drafted tokens are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Sampling


def sample(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return what is drawn from logits [K, V] or [V], [K] or a scalar, and their probabilities.

    At temperature 0 the likeliest, and None.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), None
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    drawn = torch.multinomial(probs.cpu(), 1, generator=sampling.generator)  # which is on the CPU
    return drawn.squeeze(-1).to(probs.device), probs
