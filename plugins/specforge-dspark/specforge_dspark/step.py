"""The training objective: token, distribution and confidence of every slot of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_dflash.model import parts
from specforge_dflash.step import BlockStep, by_slot, slot_metrics, slot_weights

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import DSparkConfig
from .model import DSparkModel


class DSparkStep(BlockStep[DSparkConfig]):
    """Loss and metrics of one micro-batch.

    A slot's loss is ce_weight * cross-entropy + tv_weight * sum_v |p_v - q_v| +
    confidence_weight * binary cross-entropy of its confidence against a, where
    a = 1 - sum_v |p_v - q_v| / 2 is the probability that a token drawn from q is accepted,
    taken as constant.

    Metrics are DFlash's, and acceptance_rate: mean of a over trained slots;
    expected_acceptance_length: 1 + a_1 + a_1 a_2 + ..., mean over blocks, what drawing at
    temperature 1 gets on the data; confidence_error: mean |confidence - a|.
    """

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        config, (model, frozen) = self.config, parts(draft, DSparkModel)
        found = by_slot(config, batch, *model(batch, frozen))
        cross_entropy, variation, hits, confidence, valid = found
        losses = config.ce_weight * cross_entropy + config.tv_weight * variation
        accepted = (1 - variation.detach() / 2).clamp(0, 1)
        count, blocks, kept = valid.sum().float(), valid.any(1).sum().float(), accepted * valid
        metrics = slot_metrics(cross_entropy.detach(), hits, valid)
        metrics["acceptance_rate"] = Ratio(num=kept.sum(), den=count)
        expected = kept.cumprod(dim=1).sum() + blocks
        metrics["expected_acceptance_length"] = Ratio(num=expected, den=blocks)
        if config.confidence_head:
            misjudged = F.binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
            losses = losses + config.confidence_weight * misjudged
            error = (torch.sigmoid(confidence.detach()) - accepted).abs() * valid
            metrics["confidence_error"] = Ratio(num=error.sum(), den=count)
        weights, total = slot_weights(config, cross_entropy.detach(), valid)
        return StepOutput(loss_sum=(weights * losses).sum(), weight=total, metrics=metrics)
