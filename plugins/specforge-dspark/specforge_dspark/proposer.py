"""Drafts one block after the verified tokens, each token from the one drafted before it."""

from __future__ import annotations

import torch
from specforge_dflash.around import AroundProposer, Walk
from specforge_dflash.model import Frozen
from torch import Tensor

from specforge_core.types import Proposal, Sampling, TargetCapture

from .confidence import append, calibrate, read
from .config import DSparkConfig
from .model import DSparkModel, base_logits


class DSparkProposer(AroundProposer[DSparkConfig, DSparkModel]):
    """Runs the backbone once a draft, and walks through its slots with the Markov head.

    With `confidence_threshold` a draft ends before the first token with which the probability
    that all are kept falls below it.  That is decided before this token is drawn, so what is
    emitted still follows the target's distribution.  At least one token is drafted.
    """

    def __init__(self, config: DSparkConfig, model: DSparkModel, frozen: Frozen) -> None:
        super().__init__(config, model, frozen)
        self._confidence: list[float] = []  # logits of the draft that is being verified
        self._answers = 0  # begun; the first is eval's warm-up, and is not recorded
        self._temperatures = [1.0] * self.max_tokens
        if config.calibration is not None:
            self._temperatures = calibrate(*read(config.calibration, self.max_tokens)).temperatures

    def start(self, prefix: TargetCapture, /) -> None:
        self._confidence, self._answers = [], self._answers + 1
        super().start(prefix)

    def accept(self, accepted: TargetCapture, /) -> None:
        record, whole = self._config.record_confidence, len(self._confidence) == self.max_tokens
        if record is not None and whole and self._answers > 1:
            # the token that was known stands before those that were kept
            append(record, self._confidence, len(accepted.input_ids) - 1)
        self._confidence = []
        super().accept(accepted)

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        markov = self._draft.markov_head
        hidden = self.block_states(last_token)[:max_tokens]
        token = torch.tensor(last_token, device=hidden.device)
        state, walk = None, Walk(sampling, len(self._frozen.lm_head))
        self._confidence = []
        for slot in hidden:
            embedding = markov.markov_w1(token)
            if self._ends(slot, embedding):
                break
            latent, state = markov.step(embedding, slot, state)
            token = walk.draw(base_logits(slot, self._frozen) + markov.markov_w2(latent))
        return walk.proposal()

    def _ends(self, slot: Tensor, embedding: Tensor) -> bool:
        """Note the confidence of the next token; say whether the draft ends before it."""
        config, head = self._config, self._draft.confidence_head
        if head is None or (config.record_confidence is None and not config.confidence_threshold):
            return False
        self._confidence.append(float(head(slot, embedding)))
        if len(self._confidence) == 1 or config.record_confidence is not None:
            return False  # one token at least; whole drafts are recorded
        pairs = zip(self._confidence, self._temperatures, strict=False)  # of the tokens so far
        scaled = torch.tensor([logit / t for logit, t in pairs], dtype=torch.float64)
        return float(torch.sigmoid(scaled).prod()) < config.confidence_threshold
