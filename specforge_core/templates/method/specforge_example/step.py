"""The loss of one micro-batch.  B rows of S tokens, K drafted tokens.

At serving, the states up to token t - 1 are known when token t is the last one: state s
drafts the tokens s + 2, s + 3, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .model import FrozenHead


@dataclass(frozen=True)
class ChainStep:
    """Cross-entropy of every drafted token that is supervised.

    All terms have one denominator, the number of such tokens.  Nothing here asks the device
    for a number, so the host never waits.
    """

    draft_tokens: int

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext) -> StepOutput:
        """Return the summed loss, its weight, and what would be accepted."""
        assert isinstance(draft.frozen, FrozenHead)
        labels = self._ahead(batch["input_ids"])  # [B, S, K]
        documents = batch["document_ids"]
        same = self._ahead(documents) == documents[..., None]  # none predicts another's tokens
        taught = self._ahead(batch["loss_mask"]) * same
        states = draft.model(batch["final"])  # [B, S, K, H]; call the model, never its methods
        losses, best = draft.frozen.losses(states.flatten(0, 2), labels.flatten())
        hits = (best.view_as(labels) == labels) * taught
        begins = taught[..., 0] * _shift(batch["loss_mask"], 1)  # inside an answer, as when served
        accepted = 1 + hits.cumprod(-1).sum(-1)
        return StepOutput(
            loss_sum=(losses.view_as(labels) * taught).sum(),
            weight=taught.sum().float(),
            metrics={
                "accuracy": Ratio(num=hits.sum(), den=taught.sum()),
                "acceptance_length": Ratio(num=(accepted * begins).sum(), den=begins.sum()),
            },
        )

    def _ahead(self, values: Tensor) -> Tensor:
        """Return [B, S, K]: of each place, what it drafts."""
        return torch.stack([_shift(values, 2 + k) for k in range(self.draft_tokens)], dim=-1)


def _shift(values: Tensor, by: int) -> Tensor:
    """Return what is `by` places later in [B, S]; zero behind the end."""
    return F.pad(values, (0, by))[:, by:]
