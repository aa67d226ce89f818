"""The order samples are seen in: one place, so that capture, offline and online agree."""

from __future__ import annotations

import torch


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """Return the permutation of 0..num_samples-1 of one epoch, the same on every rank."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()
