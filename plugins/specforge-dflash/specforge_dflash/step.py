"""The training objective: blocks are filled in one pass, each slot from what came before it.

Shapes: b rows, A blocks of each, D slots of a block that draft, M = b*A blocks in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from specforge_core.float8 import in_float8
from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.nn.soft_loss import SoftLoss
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .anchors import PREFIXES
from .config import Config, DFlashConfig, objective
from .memory import step_bytes
from .model import DFlashModel, Frozen, parts

SLOTS_SHOWN = 4  # slots whose accuracy is a metric of its own
KL = SoftLoss("hybrid", decay=0.0)  # a mix that is all KL


@dataclass(frozen=True)
class BlockStep(Generic[Config]):
    """Base of the steps of methods on DFlash's blocks."""

    config: Config

    @property
    def draft_tokens(self) -> int:
        """Tokens of a simulated draft, at most."""
        return self.config.num_draft_tokens


class DFlashStep(BlockStep[DFlashConfig]):
    """Loss and metrics of one micro-batch.

    A slot's loss is the cross-entropy of its label, or with `loss: kl` T^2 KL(p || q), where p
    is the target's distribution and q the draft's, both of logits divided by T.
    """

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, DFlashModel)
        hidden = model(
            batch["hidden_states"],
            frozen.embed(batch["block_ids"].flatten(1)),
            batch["anchors"],
            batch["starts"],
            batch["position_ids"],
        )
        states = hidden.flatten(0, 1)[batch["rows"]]
        if objective(self.config).loss == "kl":
            return self._distilled(states, frozen, batch)
        labels = batch["labels"].flatten()[batch["rows"]]
        row_losses, best = linear_cross_entropy(
            frozen.states(states),
            frozen.lm_head,
            labels,
            softcap=frozen.softcap,
            chunk=self.config.head_chunk,
            float8=frozen.float8_head(model),
        )
        losses, hits, valid = self._drafted(batch, row_losses, best == labels)
        weights, total = slot_weights(self.config, losses.detach(), valid)
        return StepOutput(
            loss_sum=(weights * losses).sum(),
            weight=total,
            metrics=slot_metrics(losses.detach(), hits, valid),
        )

    def float8_heads(self, draft: Draft) -> Mapping[str, Tensor]:
        """Say which heads can be in float8; see `types.Float8Heads`."""
        head = parts(draft, DFlashModel)[1].lm_head
        return {} if objective(self.config).loss == "kl" else {"the target's head": head}

    def step_bytes(
        self, draft: Draft, tokens: int, documents: int, item: int, *, recompute: bool
    ) -> Mapping[str, int]:
        """Say what a step will hold; see `types.Planned`."""
        model, _ = parts(draft, DFlashModel)
        given = self.config, model.shape, tokens, documents, item
        return step_bytes(*given, recompute=recompute, float8=in_float8(model))

    def _drafted(self, batch: Batch, *values: Tensor) -> list[Tensor]:
        """Return values [R] of the trained slots as [M, D], 0 elsewhere, and which are trained.

        Each block's slots from the first one that drafts: the one behind its known tokens.
        """
        drafted = by_slot(self.config, batch, *values)
        if PREFIXES not in batch:
            return drafted
        known = batch[PREFIXES].flatten()[:, None]
        index = torch.arange(drafted[0].shape[1], device=known.device) + known - 1
        beyond = index >= index.shape[1]
        index = index.masked_fill(beyond, 0)
        return [x.gather(1, index).masked_fill(beyond, 0) for x in drafted]

    def _distilled(self, states: Tensor, frozen: Frozen, batch: Batch) -> StepOutput:
        """Return what the slots' states [R, H] come to against the target's distribution."""
        rows, temperature = batch["rows"], objective(self.config).kl_temperature
        (valid,) = self._drafted(batch)
        weights, total = slot_weights(
            self.config, torch.zeros_like(valid, dtype=torch.float), valid
        )
        drafting = weighted = drafting_rows(self.config, batch)
        if PREFIXES in batch:
            known = batch[PREFIXES].flatten()[rows // self.config.block_size]
            weighted = drafting - (known - 1)
        given = weights.flatten()[weighted] * temperature**2
        final = batch["final"].flatten(0, 1)[teachers(self.config, batch).flatten()[drafting]]
        beside, cap = frozen.beside, frozen.softcap
        loss_sum, found = linear_soft_cross_entropy(
            (frozen.states(states) / temperature)[:, None],
            frozen.lm_head,
            frozen.states(final) * (beside.scale / temperature),
            frozen.lm_head,
            given[:, None],
            KL,
            softcap=None if cap is None else cap / temperature,
            teacher_softcap=None if beside.softcap is None else beside.softcap / temperature,
            chunk=self.config.head_chunk,
        )
        hit = found.best[:, 0] == batch["labels"].flatten()[rows]
        losses, overlaps, hits, _ = self._drafted(
            batch, found.losses[:, 0] * temperature**2, found.overlaps[:, 0], hit
        )
        metrics = slot_metrics(losses, hits, valid)
        metrics["kl"] = metrics.pop("cross_entropy")
        if temperature == 1:  # else it is not what the target draws with
            metrics["acceptance_rate"] = Ratio(num=overlaps.sum(), den=valid.sum().float())
        return StepOutput(loss_sum=loss_sum, weight=total, metrics=metrics)


def drafting_rows(config: DFlashConfig, batch: Batch) -> Tensor:
    """Return `rows` [R] counted over the D slots of each block that draft, all of M * D."""
    block, slot = batch["rows"] // config.block_size, batch["rows"] % config.block_size
    return block * (config.block_size - config.first_slot) + slot - config.first_slot


def teachers(config: DFlashConfig, batch: Batch) -> Tensor:
    """Return [M, D] where over all of b * S the token before each drafted slot's label is.

    Behind its final state the target's distribution is that of the label.  Beyond a document's
    end, where there is no label, it is any token.
    """
    ids, anchors = batch["input_ids"], batch["anchors"]
    begins = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
    slots = torch.arange(config.block_size - config.first_slot, device=ids.device)
    return ((anchors + begins).flatten()[:, None] + slots).clamp(max=ids.numel() - 1)


def by_slot(config: DFlashConfig, batch: Batch, *values: Tensor) -> list[Tensor]:
    """Return values [R] of the trained slots at their places [M, D], and which are trained.

    D are the slots of a block that draft; values of those that are not trained are 0.
    """
    valid, rows = batch["valid"].flatten(0, 1)[:, config.first_slot :], drafting_rows(config, batch)
    places = (x.new_zeros(valid.numel()).index_put((rows,), x).view(valid.shape) for x in values)
    return [*places, valid]


def slot_weights(config: DFlashConfig, losses: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each slot's weight [M, D] and what the summed loss is divided by.

    decay: w_k = exp(-k / gamma), k = 0 at the first slot that drafts; divided by the sum
    of the weights.  uniform: w_k = 1.  D-PACE: with q_k = exp(-loss_k),
    s_k = (1 - alpha) q_k + alpha and P_k = s_0 ... s_k (slots that are not valid have s = 1 and
    weight 0),
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
    if config.weighting == "uniform":
        return mask, mask.sum()
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


def mean_divisor(config: DFlashConfig, slots: int) -> float:
    """Return what a slot of a block whose `slots` are all valid adds to that divisor on average."""
    if config.weighting != "decay":
        return 1.0
    return sum(math.exp(-k / config.gamma) for k in range(slots)) / slots


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
