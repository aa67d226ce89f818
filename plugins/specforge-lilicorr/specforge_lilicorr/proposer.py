"""Drafts one block, walking from candidate to candidate through the lattice, as engines do."""

from __future__ import annotations

import torch
from specforge_dflash.around import Walk
from specforge_dflash.model import Frozen
from specforge_dflash.proposer import DFlashProposer
from torch import Tensor

from specforge_core.types import Proposal, Sampling, TargetCapture

from .config import LiLiCorrConfig
from .lattice import Vectors, scores
from .model import LiLiCorrModel, candidates


class LiLiCorrProposer(DFlashProposer):
    """Keeps the context's keys and values, and the target's states of its last token."""

    def __init__(self, config: LiLiCorrConfig, model: LiLiCorrModel, frozen: Frozen) -> None:
        super().__init__(config, model.backbone, frozen)
        self._options = config
        self._draft = model
        self._target = frozen
        self._last: Tensor | None = None  # features [1, captured]; None where the text begins

    def start(self, prefix: TargetCapture, /) -> None:
        self._last = None
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
            found = scores(before, vectors.ins[0, k], self._options.logit_scale)
            before = vectors.outs[0, k, walk.draw(found, ids[k])]
        return walk.proposal()

    @torch.no_grad()
    def lattice(self, last_token: int) -> tuple[Tensor, Vectors]:
        """Return the candidates [D, K] of D slots, and what scores them, of one lattice."""
        device, features = self._frozen.embed_tokens.device, self._last
        anchored = features is not None
        if features is None:
            features = torch.zeros(1, self._model.fc.in_features)
        states = self.block_states(last_token)[None]
        labels = torch.zeros(states.shape[:2], dtype=torch.int64, device=device)
        _, _, ids, log_probs = candidates(states, labels, self._target, self._options)
        vectors = self._draft.vectors(
            states,
            ids,
            log_probs,
            features.to(device),
            torch.tensor([anchored], device=device),
            self._target,
        )
        return ids[0], vectors
