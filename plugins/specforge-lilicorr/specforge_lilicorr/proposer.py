"""Drafts one block, walking from candidate to candidate through the lattice, as engines do."""

from __future__ import annotations

import torch
from specforge_dflash.proposer import DFlashProposer
from torch import Tensor

from specforge_core.types import Proposal, Sampling, TargetCapture

from .config import LiLiCorrConfig
from .lattice import Vectors, scores
from .model import LiLiCorrModel, Target, candidates


class LiLiCorrProposer(DFlashProposer):
    """Keeps the context's keys and values, and the target's states of its last token."""

    def __init__(self, config: LiLiCorrConfig, model: LiLiCorrModel, frozen: Target) -> None:
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
        greedy = sampling.temperature == 0
        before = vectors.anchors[0]
        tokens: list[Tensor] = []
        probs = torch.zeros(len(ids[:max_tokens]), len(self._frozen.lm_head), device=ids.device)
        for k in range(len(probs)):
            found = scores(before, vectors.ins[0, k], self._options.logit_scale)
            if greedy:
                index = found.argmax(0, keepdim=True)
            else:
                spread = torch.softmax(found / sampling.temperature, dim=0)
                probs[k].scatter_(0, ids[k], spread.to(probs.dtype))
                drawn = torch.multinomial(spread.cpu(), 1, generator=sampling.generator)
                index = drawn.to(ids.device)
            tokens.append(ids[k, index])
            before = vectors.outs[0, k, index[0]]
        return Proposal(tokens=torch.cat(tokens), probs=None if greedy else probs)

    @torch.no_grad()
    def lattice(self, last_token: int) -> tuple[Tensor, Vectors]:
        """Return the candidates [D, K] of D slots, and what scores them, of one lattice."""
        device, fc = self._frozen.embed_tokens.device, self._model.fc
        anchored = self._last is not None
        features = torch.zeros(1, fc.in_features) if self._last is None else self._last
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
