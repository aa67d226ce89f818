"""The training objective: training-time test, summed so that any split of a batch adds up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

import torch.nn.functional as F
from torch import Tensor

from specforge_core.float8 import in_float8
from specforge_core.nn.soft_loss import SoftRows
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import Config, Eagle3Config
from .curriculum import narrowed
from .frozen import parts
from .head import VocabularyModel
from .memory import step_bytes
from .model import Eagle3Model, Task
from .rows import prefix_hits
from .vocab import target_tokens


@dataclass(frozen=True)
class VocabularyStep(Generic[Config]):
    """Base of the steps of drafts with a head over a vocabulary of their own."""

    config: Config

    def float8_heads(self, draft: Draft) -> Mapping[str, Tensor]:
        """Say which heads can be in float8; see `types.Float8Heads`."""
        return {"lm_head.weight": parts(draft, VocabularyModel)[0].lm_head.weight}


class Eagle3Step(VocabularyStep[Eagle3Config]):
    """Loss and metrics of one micro-batch.

    With w_i = step_decay^i, the losses l of the trained rows and n_i of them at step i, the
    trainer divides the sum of w_i l by the weight, both summed over everything in a step:
        positions    tokens, supervised or not: sum_i w_i mean_t l, rows not trained counting 0
        supervised   sum_i w_i n_i / sum_i w_i: a mean over trained rows, times sum_i w_i
    Padding counts nowhere.
    """

    @property
    def draft_tokens(self) -> int:
        return min(self.config.steps, self.config.draft_length)

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = parts(draft, Eagle3Model)
        config = self.config
        head = frozen.teacher_head(model.d2t)
        batch = narrowed(config, batch, head, model.shape.softcap, ctx)
        task = Task(batch, head, config.objective)
        embeddings = frozen.embed(batch["input_ids"][0])
        loss_sum, found = model(batch["hidden_states"][0], embeddings, task)

        if config.mean_over == "positions":
            weight = task.row_weights.new_full((), batch["input_ids"].numel())
        else:
            steps = task.row_weights.shape[1]
            weight = task.row_weights.sum() / sum(config.step_weights[:steps])
        hits = target_tokens(model.d2t)[found.best] == batch["choices"][:, None]
        metrics = self._metrics(batch, hits & task.present, found)
        return StepOutput(loss_sum=loss_sum, weight=weight, metrics=metrics)

    def step_bytes(
        self, draft: Draft, tokens: int, documents: int, item: int, *, recompute: bool
    ) -> Mapping[str, int]:
        """Say what a step will hold; see `types.Planned`."""
        model, _ = parts(draft, Eagle3Model)
        given = self.config, model.shape, tokens, item
        return step_bytes(*given, recompute=recompute, float8=in_float8(model))

    def _metrics(self, batch: Batch, hits: Tensor, found: SoftRows) -> dict[str, Ratio]:
        """Return `draft_metrics`, and the part of the labels that can be drafted."""
        present, starts, supervised = (batch[n] for n in ("present", "starts", "supervised"))
        # the names are the same while there are fewer steps
        later = (0, self.config.steps - hits.shape[1])
        right, total = (F.pad(x.sum(0).float(), later) for x in (hits, present))
        answered = hits & batch["answers"][:, None]
        accepted = prefix_hits(answered, batch["students"], present, starts.numel())
        accepted = accepted.clamp(max=self.draft_tokens)
        metrics = draft_metrics((found.overlaps * present).sum(), right, total, accepted, starts)
        return {"in_draft_vocab": Ratio(num=total[0], den=supervised.sum().float()), **metrics}


def draft_metrics(
    overlap: Tensor, right: Tensor, trained: Tensor, accepted: Tensor, starts: Tensor
) -> dict[str, Ratio]:
    """Return what a draft would get right, and would get accepted.

    acceptance_rate: `overlap`, the sum of min(p, q), p over the target's whole vocabulary, mean
    over trained rows.  acceptance_length counts the verified token too: 1 + `accepted` [N], the
    hits before the first miss, over the rows `starts` [N] whose last and first drafted token are
    both an answer's.  A target token outside of the draft vocabulary and the end of what is
    supervised are misses.  accuracy_k: of the rows of step k that are trained, `trained` [R],
    those whose best token is the target's, `right` [R].
    """
    drafted = ((1 + accepted) * starts).sum().float()
    metrics = {
        "acceptance_rate": Ratio(num=overlap, den=trained.sum()),
        "acceptance_length": Ratio(num=drafted, den=starts.sum().float()),
    }
    return metrics | {
        f"accuracy_{k + 1}": Ratio(num=right[k], den=trained[k]) for k in range(len(trained))
    }
