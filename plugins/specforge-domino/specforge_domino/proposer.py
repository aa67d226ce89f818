"""Drafts one block, token by token: each is corrected by those drafted before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_dflash.around import AroundProposer, Walk

from specforge_core.types import Proposal, Sampling

from .config import DominoConfig
from .model import DominoModel


class DominoProposer(AroundProposer[DominoConfig, DominoModel]):
    """The backbone runs once a block, the correction once a token."""

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        draft, frozen = self._draft, self._frozen
        hidden = self.block_states(last_token)[: min(max_tokens, self.max_tokens)]
        head = frozen.lm_head
        base = F.linear(frozen.states(hidden).to(head.dtype), head).float()  # no softcap yet
        token = torch.tensor([last_token], device=hidden.device)
        state = None
        walk = Walk(sampling, len(head))
        for k, logits in enumerate(base):
            state = draft.prefix_gru(frozen.embed(token)[None], state)[:, 0]
            if k >= draft.pure:
                logits = logits + draft.embed_proj[2](draft.codes(hidden[k], state[0])).float()
            if frozen.softcap is not None:
                logits = frozen.softcap * torch.tanh(logits / frozen.softcap)
            token = walk.draw(logits)[None]
        return walk.proposal()
