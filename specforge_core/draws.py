"""Random numbers that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def draws_of(*names: object) -> torch.Generator:
    """Return a new generator for what is named, such as a seed, an epoch and a sample.

    Other names give other draws; what was drawn before does not matter.
    """
    text = "/".join(map(str, names))
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def later_seed(seed: int, number: int) -> int:
    """Return the seed of a run's part, counted from 0: its own for the first, others of 32 bits."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
