"""Drafts one block, walking from candidate to candidate through the lattice, as engines do."""

from __future__ import annotations

import torch
from specforge_dflash.around import AroundProposer, Walk
from torch import Tensor

from specforge_core.types import Proposal, Sampling, TargetCapture

from .config import LiLiCorrConfig
from .lattice import Vectors, scores
from .model import LiLiCorrModel, candidates


class LiLiCorrProposer(AroundProposer[LiLiCorrConfig, LiLiCorrModel]):
    """Keeps the context's keys and values, and the target's states of its last token."""

    def start(self, prefix: TargetCapture, /) -> None:
        # features [1, captured]; where the text begins there are none
        self._last = torch.zeros(1, self._model.fc.in_features)
        super().start(prefix)

    def accept(self, accepted: TargetCapture, /) -> None:
        super().accept(accepted)
        if len(accepted.input_ids):
            self._last = self._pending[-1][-1:]

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        ids, vectors = self.lattice(last_token)
        before, walk = vectors.anchors[0], Walk(sampling, len(self._frozen.lm_head))
        for k in range(len(ids[:max_tokens])):
            found = scores(before, vectors.ins[0, k], self._config.logit_scale)
            before = vectors.outs[0, k, walk.draw(found, ids[k])]
        return walk.proposal()

    @torch.no_grad()
    def lattice(self, last_token: int) -> tuple[Tensor, Vectors]:
        """Return the candidates [D, K] of D slots, and what scores them, of one lattice."""
        states, frozen = self.block_states(last_token)[None], self._frozen
        labels = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        _, _, ids, log_probs = candidates(states, labels, frozen, self._config)
        anchored = torch.tensor([self._caches[0].length > 0], device=states.device)
        context = self._model.context(self._last.to(states.device))
        lattice = self._draft.lilicorr
        return ids[0], lattice(frozen.embed(ids), log_probs, states, context, anchored)
