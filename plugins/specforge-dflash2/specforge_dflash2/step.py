"""The training objective: DFlash's for the head, and the same for the selector.

Shapes: b rows, A blocks of each, D slots of a block that draft, M = b*A blocks in all, R slots
that are trained, K candidates of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from specforge_dflash.model import Frozen
from specforge_dflash.step import by_slot, slot_metrics, slot_weights

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.types import Batch, Draft, StepContext, StepOutput

from .config import DFlash2Config


@dataclass(frozen=True, slots=True)
class DFlash2Step:
    """Loss and metrics of one micro-batch."""

    config: DFlash2Config

    @property
    def draft_tokens(self) -> int:
        return self.config.num_draft_tokens

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        frozen, rows = draft.frozen, batch["rows"]
        assert isinstance(frozen, Frozen)
        labels = batch["labels"].flatten()[rows]
        states, scores, gold, found = draft.model(
            batch["hidden_states"],
            frozen.embed(batch["block_ids"].flatten(1)),
            batch["anchors"],
            batch["starts"],
            batch["position_ids"],
            rows,
            batch["previous"].flatten()[rows],
            labels,
            frozen.lm_head,
            frozen.softcap,
        )
        losses, best = linear_cross_entropy(
            states, frozen.lm_head, labels, softcap=frozen.softcap, chunk=self.config.head_chunk
        )
        chosen = F.cross_entropy(scores, gold, reduction="none")
        # the true token was put among the candidates for the loss: no hit without it there
        right = found & (scores.argmax(1) == gold)
        first, valid = self.config.first_slot, batch["valid"].flatten(0, 1)
        valid = valid[:, first:]
        losses, chosen, right, base, found = (
            by_slot(batch, x)[:, first:] for x in (losses, chosen, right, best == labels, found)
        )
        weights, total = slot_weights(self.config, losses.detach(), valid)
        both = losses + self.config.selector_weight * chosen
        walk, head, oracle = (
            slot_metrics(x.detach(), hits, valid)
            for x, hits in ((chosen, right), (losses, base), (losses, found))
        )
        # Behind hits alone the token before a slot is the true one, so the length of the walk is
        # what the served one gets accepted.
        metrics = walk | {
            "cross_entropy": head["cross_entropy"],
            "selector_cross_entropy": walk["cross_entropy"],
            "base_accuracy": head["accuracy"],
            "base_acceptance_length": head["acceptance_length"],
            f"recall_at_{scores.shape[1]}": oracle["accuracy"],
            "oracle_acceptance_length": oracle["acceptance_length"],
        }
        return StepOutput(loss_sum=(weights * both).sum(), weight=total, metrics=metrics)
