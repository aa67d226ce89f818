"""Drafts one block, walking from token to token over the slots' candidates, as engines do."""

from __future__ import annotations

import torch
from specforge_dflash.around import Walk
from specforge_dflash.model import Frozen
from specforge_dflash.proposer import DFlashProposer
from torch import Tensor

from specforge_core.nn.linear_top_k import linear_top_k
from specforge_core.types import Proposal, Sampling

from .config import DFlash2Config
from .model import DFlash2Model


class DFlash2Proposer(DFlashProposer):
    """Keeps the context's keys and values; a block's own are never kept."""

    def __init__(self, config: DFlash2Config, model: DFlash2Model, frozen: Frozen) -> None:
        super().__init__(config, model.backbone, frozen)
        self._top_k = config.selector_top_k
        self._multiplier = config.output_multiplier
        self._selector = model.candidate_selector

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        ids, logits, states = self.lattice(last_token)
        token, walk = ids.new_tensor(last_token), Walk(sampling, len(self._frozen.lm_head))
        for k in range(len(ids[:max_tokens])):
            slot = slice(k, k + 1)
            scores = self._selector(states[slot], token[None], ids[slot], logits[slot])[0]
            token = ids[k, walk.draw(scores, ids[k])]
        return walk.proposal()

    @torch.no_grad()
    def lattice(self, last_token: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates [D, K], their logits float32 and the states [D, H] of D slots."""
        states, frozen = self.block_states(last_token), self._frozen
        scaled = frozen.states(states) * self._multiplier
        ids, logits = linear_top_k(scaled, frozen.lm_head, self._top_k, softcap=frozen.softcap)
        return ids, logits, states
