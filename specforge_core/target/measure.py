"""What a model does around its head, measured: its decoder and head are replaced by known ones.

Configs spell scales and bounds in many ways, and one spelling means opposite things in two
families, so the model's own code is asked.  No weights are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .skeleton import find_parts

SMALL, LARGE = 2.0**-20, 2.0**20  # logits at which a softcap is no bound, and is nothing else


@dataclass(frozen=True, slots=True)
class HeadScale:
    """What happens to logits beside the head's own matrix and bias."""

    scale: float
    softcap: float | None


class _Output(BaseModelOutputWithPast):
    """What a decoder returns; caches, attentions and whatever else is asked for are None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Head(nn.Module):
    """Notes what the head is given, and gives known logits."""

    def __init__(self, logits: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.logits = logits
        self.seen: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(0))
        self.out_features = getattr(like, "out_features", len(logits))

    def forward(self, states: Tensor) -> Tensor:
        """Return the same logits for every state [B, T, H]."""
        self.seen = states
        return self.logits.expand(*states.shape[:-1], -1)


@torch.no_grad()
def measure_head(model: Any, hidden_size: int) -> HeadScale | None:
    """Return what `model` (a skeleton) does to logits; None where it cannot be run so."""
    parts = find_parts(model)
    if parts.head is None:
        return None
    probe = _Head(torch.tensor([0.0, SMALL, LARGE]), parts.head)
    states = torch.ones(1, 1, hidden_size)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with _replaced(model, parts.decoder, parts.head, states, probe):
            logits = model(input_ids=ids, use_cache=False).logits.reshape(-1).double()
    except Exception:  # any model's code, which was not made for this: there are other ways
        return None
    if probe.seen is None or len(logits) != 3 or probe.seen.device.type == "meta":
        return None
    before = float(probe.seen.double().mean())  # states are scaled instead of logits
    after = float(logits[1]) / SMALL
    bound = float(logits[2])
    capped = bound < 0.5 * after * LARGE
    return HeadScale(scale=before * after, softcap=bound if capped else None)


@contextmanager
def _replaced(
    model: Any, decoder: nn.Module, head: nn.Module, states: Tensor, probe: nn.Module
) -> Iterator[None]:
    """Let the decoder return `states`, and `probe` be the head, inside the block."""
    places = [(m, n) for m in model.modules() for n, c in m.named_children() if c is head]
    decoder.forward = lambda *args, **kwargs: _Output(last_hidden_state=states)
    for module, name in places:
        setattr(module, name, probe)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, head)
        del decoder.forward
