"""The training objective: DFlash's for the head, and the same for the selector.

Shapes: b rows, A blocks of each, D slots of a block that draft, M = b*A blocks in all, R slots
that are trained, K candidates of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from specforge_dflash.model import parts
from specforge_dflash.step import BlockStep, by_slot, slot_metrics, slot_weights
from torch import Tensor

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import DFlash2Config
from .model import DFlash2Model


class DFlash2Step(BlockStep[DFlash2Config]):
    """Loss and metrics of one micro-batch."""

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, DFlash2Model)
        labels = batch["labels"].flatten()[batch["rows"]]
        states, scores, gold, found = model(batch, frozen)
        losses, best = linear_cross_entropy(
            states,
            frozen.lm_head,
            labels,
            softcap=frozen.softcap,
            chunk=self.config.head_chunk,
            float8=frozen.float8_head(model),
        )
        chosen = F.cross_entropy(scores, gold, reduction="none")
        # the true token was put among the candidates for the loss: no hit without it there
        right = found & (scores.argmax(1) == gold)
        losses, chosen, right, base, found, valid = by_slot(
            self.config, batch, losses, chosen, right, best == labels, found
        )
        weights, total = slot_weights(self.config, losses.detach(), valid)
        both = losses + self.config.selector_weight * chosen
        metrics = path_metrics(losses.detach(), right, base, found, valid, scores.shape[1])
        spent = (chosen.detach() * valid).sum()
        metrics["selector_cross_entropy"] = Ratio(num=spent, den=valid.sum().float())
        return StepOutput(loss_sum=(weights * both).sum(), weight=total, metrics=metrics)

    def float8_heads(self, draft: Draft) -> Mapping[str, Tensor]:
        """Say which heads can be in float8; see `types.Float8Heads`."""
        return {"the target's head": parts(draft, DFlash2Model)[1].lm_head}


def path_metrics(
    losses: Tensor, right: Tensor, base: Tensor, found: Tensor, valid: Tensor, top_k: int
) -> dict[str, Ratio]:
    """Return DFlash's metrics for a path through the `top_k` candidates of slots, all [M, D].

    `right` where it takes the true token behind the true one: behind hits alone that is what is
    served, so its length is what the served one gets accepted.  `base_`: the head alone, right
    at `base`; `oracle_`: any path, right at `found`.
    """
    path, head, oracle = (slot_metrics(losses, hits, valid) for hits in (right, base, found))
    return path | {
        "base_accuracy": head["accuracy"],
        "base_acceptance_length": head["acceptance_length"],
        f"recall_at_{top_k}": oracle["accuracy"],
        "oracle_acceptance_length": oracle["acceptance_length"],
    }
