"""The training objective, summed so that any split of a batch adds up."""

from __future__ import annotations

import torch
from specforge_eagle3.frozen import parts
from specforge_eagle3.head import Teacher
from specforge_eagle3.step import VocabularyStep, draft_metrics
from specforge_eagle3.vocab import target_tokens

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import PeagleConfig
from .elements import Elements
from .model import PeagleModel


class PeagleStep(VocabularyStep[PeagleConfig]):
    """Loss and metrics of one micro-batch.

    The loss is a mean over all elements that are trained, whatever their depth.  Metrics are
    EAGLE-3's, of depth k-1 in place of step k; an acceptance length is of a row of which nothing
    was dropped.
    """

    @property
    def draft_tokens(self) -> int:
        return self.config.draft_tokens

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, PeagleModel)
        rows = {n: batch[n][batch["labels"]] for n in ("final", "logsumexp", "choices", "answers")}
        rows["row_weights"] = torch.ones_like(rows["logsumexp"])[:, None]
        teacher = Teacher(rows, frozen.teacher_head(model.d2t), self.config.objective)
        elements = Elements(batch, self.config.attention)
        features, starts = batch["hidden_states"][0], batch["starts"][0]
        loss_sum, found = model(features, batch["inputs"], frozen.embed, elements, teacher)

        hits = target_tokens(model.d2t)[found.best[:, 0]] == rows["choices"]
        depth, anchors = (x[elements.trained] for x in (elements.depth, elements.anchors))
        grid = hits.new_zeros(3, self.config.depths, len(starts))
        grid[:, depth, anchors] = torch.stack([hits, torch.ones_like(hits), hits & rows["answers"]])
        right, total = grid[:2].sum(2).float()
        accepted = grid[2, : self.draft_tokens].cumprod(0).sum(0)
        metrics = {"in_draft_vocab": Ratio(num=total.sum(), den=batch["supervised"].sum().float())}
        metrics |= draft_metrics(found.overlaps.sum(), right, total, accepted, starts)
        return StepOutput(loss_sum=loss_sum, weight=total.sum(), metrics=metrics)
