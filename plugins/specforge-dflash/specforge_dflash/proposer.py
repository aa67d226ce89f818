"""Drafts one block after the verified tokens, for evaluation and as a reference for serving."""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor

from specforge_core.nn.cache import GrowingCache
from specforge_core.nn.sampling import sample
from specforge_core.types import Proposal, Sampling, TargetCapture

from .config import Config
from .model import DFlashModel, Frozen


class DFlashProposer(Generic[Config]):
    """Keeps the context's keys and values; a block's own are never kept."""

    def __init__(self, config: Config, model: DFlashModel, frozen: Frozen) -> None:
        self._config = config
        self._model = model
        self._frozen = frozen
        self._caches = [GrowingCache(2) for _ in model.layers]
        self._pending: list[Tensor] = []  # features [n, K*H] not in the cache yet

    @property
    def max_tokens(self) -> int:
        return self._config.num_draft_tokens

    def start(self, prefix: TargetCapture, /) -> None:
        self._caches = [GrowingCache(2) for _ in self._model.layers]
        self._pending = []
        self.accept(prefix)

    def accept(self, accepted: TargetCapture, /) -> None:
        layers = self._model.shape.capture_layers
        self._pending.append(torch.cat([accepted.hidden_states[i] for i in layers], dim=-1))

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        tokens, probs = sample(self.block_logits(last_token)[:max_tokens], sampling)
        return Proposal(tokens=tokens, probs=probs)

    @torch.no_grad()
    def block_logits(self, last_token: int, *known: int) -> Tensor:
        """Return logits [max_tokens, V] float32 for the tokens after `last_token`.

        With `known` drafted tokens, which are taken as they are, those for the tokens after them.
        """
        return self._frozen.logits(self.block_states(last_token, *known))

    @torch.no_grad()
    def block_states(self, last_token: int, *known: int) -> Tensor:
        """Return the final states [max_tokens, H], normed, that `Frozen.logits` takes.

        For methods that correct a block's logits, token by token, by its states.
        """
        device = self._frozen.embed_tokens.device
        shape = self._model.shape
        block = torch.full((1, shape.block_size), shape.mask_token_id, device=device)
        block[:, 0] = last_token
        for slot, token in enumerate(known, 1):
            block[:, slot] = token
        width = self._model.fc.in_features
        new = [f.to(device) for f in self._pending] or [torch.empty(0, width, device=device)]
        features = torch.cat(new)[None]
        self._pending = []
        start = self._caches[0].length
        positions = torch.arange(start, start + features.shape[1], device=device)[None]
        anchor = torch.full((1, 1), start + features.shape[1], device=device)
        hidden = self._model(
            features,
            self._frozen.embed(block),
            anchor,
            torch.zeros_like(anchor),
            positions,
            self._caches,
        )
        states: Tensor = hidden[0, self._config.first_slot + len(known) :]
        return states
