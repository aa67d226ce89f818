"""Drafts one block, walking from token to token over the slots' candidates, as engines do."""

from __future__ import annotations

import torch
from specforge_dflash.around import AroundProposer, Walk
from torch import Tensor

from specforge_core.nn.linear_top_k import linear_top_k
from specforge_core.types import Proposal, Sampling

from .config import DFlash2Config
from .model import DFlash2Model


class DFlash2Proposer(AroundProposer[DFlash2Config, DFlash2Model]):
    """Keeps the context's keys and values; a block's own are never kept."""

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        ids, logits, states = self.lattice(last_token)
        token, walk = ids.new_tensor(last_token), Walk(sampling, len(self._frozen.lm_head))
        select = self._draft.candidate_selector
        for k in range(len(ids[:max_tokens])):
            slot = slice(k, k + 1)
            scores = select(states[slot], token[None], ids[slot], logits[slot])[0]
            token = ids[k, walk.draw(scores, ids[k])]
        return walk.proposal()

    @torch.no_grad()
    def lattice(self, last_token: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates [D, K], their logits float32 and the states [D, H] of D slots."""
        states, config, frozen = self.block_states(last_token), self._config, self._frozen
        scaled, top_k = frozen.states(states) * config.output_multiplier, config.selector_top_k
        ids, logits = linear_top_k(scaled, frozen.lm_head, top_k, softcap=frozen.softcap)
        return ids, logits, states
