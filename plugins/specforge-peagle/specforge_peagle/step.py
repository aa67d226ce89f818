"""The training objective, summed so that any split of a batch adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from specforge_eagle3.frozen import Frozen
from specforge_eagle3.vocab import target_tokens
from torch import Tensor

from specforge_core.nn.soft_loss import SoftRows
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import PeagleConfig
from .model import PeagleModel, Task


@dataclass(frozen=True, slots=True)
class PeagleStep:
    """Loss and metrics of one micro-batch.

    The loss is a mean over all elements that are trained, whatever their depth.
    """

    config: PeagleConfig

    @property
    def draft_tokens(self) -> int:
        return self.config.draft_tokens

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = draft.model, draft.frozen
        assert isinstance(model, PeagleModel)
        assert isinstance(frozen, Frozen)
        task = Task(batch, frozen.teacher_head(model.d2t), self.config.objective)
        inputs = batch["inputs"]
        if not self.config.train_embedding:
            inputs = frozen.embed(inputs)
        loss_sum, found = model(batch["hidden_states"][0], inputs, task)
        hits = target_tokens(model.d2t)[found.best[:, 0]] == batch["choices"][batch["labels"]]
        return StepOutput(
            loss_sum=loss_sum,
            weight=loss_sum.new_full((), len(hits)).detach(),
            metrics=self._metrics(batch, hits, found),
        )

    def _metrics(self, batch: Batch, hits: Tensor, found: SoftRows) -> dict[str, Ratio]:
        """Return what the draft would get right, and would get accepted.

        accuracy_k: of the trained elements of depth k-1, those whose best token is the target's.
        acceptance_rate: sum of min(p, q), p over the target's whole vocabulary, mean over them.
        acceptance_length counts the verified token too: 1 + the hits before the first miss, at
        most draft_tokens, over the whole rows whose last and first drafted token are both an
        answer's.  A target token outside of the draft vocabulary and the end of what is
        supervised are misses.
        """
        starts, trained = batch["starts"][0], batch["trained"]
        depth, anchors = batch["depth"][trained], batch["anchors"][trained]
        right = hits.new_zeros(self.config.depths, len(starts))
        there = right.clone()
        right[depth, anchors] = hits
        there[depth, anchors] = torch.ones_like(hits)  # a number would be waited for
        accurate, total = right.sum(1).float(), there.sum(1).float()
        right[depth, anchors] = hits & batch["answers"][batch["labels"]]
        accepted = right[: self.draft_tokens].cumprod(0).sum(0)
        drafted = ((1 + accepted) * starts).sum().float()
        metrics = {
            "acceptance_rate": Ratio(num=found.overlaps.sum(), den=total.sum()),
            "acceptance_length": Ratio(num=drafted, den=starts.sum().float()),
            "in_draft_vocab": Ratio(num=total.sum(), den=batch["supervised"].sum().float()),
        }
        return metrics | {
            f"accuracy_{k + 1}": Ratio(num=accurate[k], den=total[k]) for k in range(len(total))
        }
