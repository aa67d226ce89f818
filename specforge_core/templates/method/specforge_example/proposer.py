"""The draft while decoding: one sequence, its states given by the target."""

from __future__ import annotations

import torch

from specforge_core.types import Draft, Proposal, Sampling, TargetCapture

from .model import Blocks, FrozenHead


class ChainProposer:
    """Drafts a chain of tokens from the last verified state.

    Model and head come in the target's dtype and on its device.
    """

    def __init__(self, draft: Draft) -> None:
        assert isinstance(draft.model, Blocks)
        assert isinstance(draft.frozen, FrozenHead)
        self.model, self.head = draft.model, draft.frozen
        self.max_tokens = len(self.model.blocks)

    def start(self, prefix: TargetCapture) -> None:
        """See the prompt; forget what was before."""
        self.accept(prefix)

    def accept(self, accepted: TargetCapture) -> None:
        """See the tokens verified since, but the last: the target has not run on it yet."""
        assert accepted.final is not None
        self.state = accepted.final[-1]  # [H]

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        """Draft the most likely tokens; chosen, not drawn, so without probabilities."""
        states = self.model(self.state.to(self.head.weight.dtype))[:max_tokens]
        return Proposal(tokens=self.head(states).argmax(-1), probs=None)
