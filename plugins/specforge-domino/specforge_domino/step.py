"""The training objective: the backbone's own logits first, then more and more the corrected ones.

Shapes: b rows, A blocks of each, B slots of a block, D of them that predict, R trained slots.
"""

from __future__ import annotations

from functools import partial

import torch
from specforge_dflash.model import parts
from specforge_dflash.step import (
    BlockStep,
    by_slot,
    drafting_rows,
    slot_metrics,
    slot_weights,
    teachers,
)
from torch import Tensor

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import DominoConfig
from .loss import Scored, corrected_cross_entropy
from .model import DominoModel


class DominoStep(BlockStep[DominoConfig]):
    """Loss and metrics of one micro-batch."""

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, DominoModel)
        share = max(0.0, 1 - ctx.progress / self.config.base_loss_decay) if ctx.training else 0.0
        labels = batch["labels"].flatten()[batch["rows"]]

        def score(hidden: Tensor, codes: Tensor, proj: Tensor) -> tuple[Scored, Tensor]:
            inputs = frozen.states(hidden), codes, frozen.lm_head, proj
            scored = partial(
                corrected_cross_entropy,
                base_share=share,
                softcap=frozen.softcap,
                chunk=self.config.head_chunk,
            )
            losses = torch.zeros_like(labels, dtype=torch.float32)
            if self.config.weighting != "decay":  # weights that hang on the losses themselves
                with torch.no_grad():
                    losses = scored(*inputs, labels, losses).losses[1]
            weights, total = self._weights(batch, losses)
            return scored(*inputs, labels, weights), total

        found, weight = model(
            batch["hidden_states"],
            frozen.embed(batch["block_ids"].flatten(1)),
            batch["anchors"],
            batch["starts"],
            batch["position_ids"],
            frozen.embed(batch["input_ids"].flatten()[teachers(self.config, batch)]),
            batch["rows"],
            score,
        )
        metrics = self._metrics(batch, labels, found)
        metrics["base_share"] = Ratio(num=weight * share, den=weight)
        return StepOutput(loss_sum=found.loss_sum, weight=weight, metrics=metrics)

    def _weights(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [R] of the trained slots, and what the loss is divided by."""
        weights, total = slot_weights(self.config, *by_slot(self.config, batch, losses))
        return weights.flatten()[drafting_rows(self.config, batch)], total

    def _metrics(self, batch: Batch, labels: Tensor, found: Scored) -> dict[str, Ratio]:
        """Return DFlash's metrics of the drafted tokens; those of the bare logits are `base_`."""
        values = zip(found.losses, found.best == labels, strict=True)
        base, final = (
            slot_metrics(*(x[:, : self.draft_tokens] for x in by_slot(self.config, batch, *pair)))
            for pair in values
        )
        return final | {f"base_{n}": r for n, r in base.items() if not n.startswith("accuracy_")}
