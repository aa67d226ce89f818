"""The training objective, summed so that any split of a batch adds up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from specforge_eagle3.frozen import parts
from specforge_eagle3.step import draft_metrics
from specforge_eagle3.vocab import target_tokens
from torch import Tensor

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import PeagleConfig
from .model import PeagleModel, Task


@dataclass(frozen=True, slots=True)
class PeagleStep:
    """Loss and metrics of one micro-batch.

    The loss is a mean over all elements that are trained, whatever their depth.  Metrics are
    EAGLE-3's, of depth k-1 in place of step k; an acceptance length is of a row of which nothing
    was dropped.
    """

    config: PeagleConfig

    @property
    def draft_tokens(self) -> int:
        return self.config.draft_tokens

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, PeagleModel)
        task = Task(batch, frozen.teacher_head(model.d2t), self.config.objective)
        ids = batch["inputs"]
        inputs = ids if self.config.train_embedding else frozen.embed(ids)
        loss_sum, found = model(batch["hidden_states"][0], inputs, task)
        labels, starts, trained = batch["labels"], batch["starts"][0], batch["trained"]
        hits = target_tokens(model.d2t)[found.best[:, 0]] == batch["choices"][labels]
        depth, anchors = batch["depth"][trained], batch["anchors"][trained]
        right = hits.new_zeros(self.config.depths, len(starts))
        there = right.clone()
        right[depth, anchors] = hits
        there[depth, anchors] = torch.ones_like(hits)  # a number would be waited for
        accurate, total = right.sum(1).float(), there.sum(1).float()
        right[depth, anchors] = hits & batch["answers"][labels]
        accepted = right[: self.draft_tokens].cumprod(0).sum(0)
        metrics = {"in_draft_vocab": Ratio(num=total.sum(), den=batch["supervised"].sum().float())}
        metrics |= draft_metrics(found.overlaps.sum(), accurate, total, accepted, starts)
        weight = loss_sum.new_full((), len(hits))
        return StepOutput(loss_sum=loss_sum, weight=weight, metrics=metrics)

    def float8_heads(self, draft: Draft) -> Mapping[str, Tensor]:
        """Say which heads can be in float8; see `types.Float8Heads`."""
        return {"lm_head.weight": parts(draft, PeagleModel)[0].lm_head.weight}
