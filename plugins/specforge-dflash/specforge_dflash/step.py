"""The training objective: blocks are filled in one pass, each slot from what came before it.

Shapes: b rows, A blocks of each, D slots of a block that draft, M = b*A blocks in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import DFlashConfig
from .memory import step_bytes
from .model import DFlashModel, Frozen

SLOTS_SHOWN = 4  # slots whose accuracy is a metric of its own


@dataclass(frozen=True, slots=True)
class DFlashStep:
    """Loss and metrics of one micro-batch."""

    config: DFlashConfig

    @property
    def draft_tokens(self) -> int:
        return self.config.num_draft_tokens

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        frozen, model = draft.frozen, draft.model
        assert isinstance(frozen, Frozen)
        assert isinstance(model, DFlashModel)
        losses, hits = self._slots(model, frozen, batch)
        valid = batch["valid"].flatten(0, 1)[:, self.config.first_slot :]
        weights, total = slot_weights(self.config, losses.detach(), valid)
        return StepOutput(
            loss_sum=(weights * losses).sum(),
            weight=total,
            metrics=slot_metrics(losses.detach(), hits, valid),
        )

    def step_bytes(
        self, draft: Draft, tokens: int, documents: int, item: int, *, recompute: bool
    ) -> Mapping[str, int]:
        """Say what a step will hold; see `types.Planned`."""
        assert isinstance(draft.model, DFlashModel)
        shape = draft.model.shape
        return step_bytes(self.config, shape, tokens, documents, item, recompute=recompute)

    def _slots(self, model: DFlashModel, frozen: Frozen, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return losses (0 where not valid) and hits of the M blocks, both [M, D]."""
        rows = batch["rows"]
        labels = batch["labels"].flatten()[rows]
        hidden = model(
            batch["hidden_states"],
            frozen.embed(batch["block_ids"].flatten(1)),
            batch["anchors"],
            batch["starts"],
            batch["position_ids"],
        )
        row_losses, best = linear_cross_entropy(
            frozen.states(hidden.flatten(0, 1)[rows]),
            frozen.lm_head,
            labels,
            softcap=frozen.softcap,
            chunk=self.config.head_chunk,
        )
        first = self.config.first_slot
        hits = by_slot(batch, best == labels)
        return by_slot(batch, row_losses)[:, first:], hits[:, first:]


def by_slot(batch: Batch, values: Tensor) -> Tensor:
    """Return values [R] of the trained slots at their places [M, B], and 0 elsewhere."""
    valid = batch["valid"].flatten(0, 1)
    return values.new_zeros(valid.numel()).index_put((batch["rows"],), values).view(valid.shape)


def slot_weights(config: DFlashConfig, losses: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each slot's weight [M, D] and what the summed loss is divided by.

    decay: w_k = exp(-k / gamma), k = 0 at the first slot that drafts; divided by the sum
    of the weights.  D-PACE: with q_k = exp(-loss_k), s_k = (1 - alpha) q_k + alpha and
    P_k = s_0 ... s_k (slots that are not valid have s = 1 and weight 0),
        dpace               w_k = P_k + P_{k+1} + ...
        dpace_confidence    w_k = P_k
        dpace_continuation  w_k = (P_k + P_{k+1} + ...) / P_k
    divided by the number of valid slots, which keeps the loss near a cross-entropy.
    """
    mask = valid.float()
    if config.weighting == "decay":
        slots = torch.arange(valid.shape[1], device=valid.device)
        weights = mask * torch.exp(-slots / config.gamma)
        return weights, weights.sum()
    alpha = config.dpace_alpha
    smoothed = (1 - alpha) * torch.exp(-losses) + alpha
    prefix = torch.where(valid, smoothed, 1.0).cumprod(dim=1)
    suffix = (mask * prefix).flip(1).cumsum(dim=1).flip(1)
    weights = {
        "dpace": suffix,
        "dpace_confidence": prefix,
        # never over zero: prefixes shrink by at least alpha, or alpha is 0 and q underflowed
        "dpace_continuation": suffix / prefix.clamp(min=1e-30),
    }[config.weighting]
    return mask * weights, mask.sum()


def slot_metrics(losses: Tensor, hits: Tensor, valid: Tensor) -> dict[str, Ratio]:
    """Return cross-entropy, accuracy by slot, and what a block would get accepted.

    The accepted length counts the verified token too: 1 + the hits before the first
    miss, over the blocks with a valid slot; a block ends at its first slot that is not.
    """
    slots = valid.sum(0).float()
    right = (hits & valid).sum(0).float()
    prefix = (hits & valid).cumprod(dim=1).sum(1)
    blocks = valid.any(1)
    metrics = {
        "cross_entropy": Ratio(num=losses.sum(), den=slots.sum()),
        "accuracy": Ratio(num=right.sum(), den=slots.sum()),
        "acceptance_length": Ratio(
            num=((1 + prefix) * blocks).sum().float(), den=blocks.sum().float()
        ),
    }
    for k in range(min(SLOTS_SHOWN, valid.shape[1])):
        metrics[f"accuracy_{k + 1}"] = Ratio(num=right[k], den=slots[k])
    return metrics
