"""The training objective: training-time test, summed so that any split of a batch adds up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specforge_core.nn.linear_soft_cross_entropy import SoftRows
from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import Eagle3Config
from .frozen import Frozen
from .model import Eagle3Model, Task
from .rows import Rows
from .vocab import target_tokens


@dataclass(frozen=True, slots=True)
class Eagle3Step:
    """Loss and metrics of one micro-batch.

    With w_i = step_decay^i, the losses l of the trained rows and n_i of them at step i, the
    trainer divides the sum of w_i l by the weight, both summed over everything in a step:
        positions    tokens, supervised or not: sum_i w_i mean_t l, rows not trained counting 0
        supervised   sum_i w_i n_i / sum_i w_i: a mean over trained rows, times sum_i w_i
    Padding counts nowhere.
    """

    config: Eagle3Config

    @property
    def draft_tokens(self) -> int:
        return min(self.config.steps, self.config.draft_length)

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        model, frozen = draft.model, draft.frozen
        assert isinstance(model, Eagle3Model)
        assert isinstance(frozen, Frozen)
        config = self.config
        rows = Rows.build(batch, model.t2d, config.mask_on, config.steps)
        head = frozen.teacher_head(model.d2t)
        task = Task(rows, head, config.step_weights, config.objective)
        embeddings = frozen.embed(rows.batch["input_ids"])
        loss_sum, found = model(rows.batch["hidden_states"], embeddings, task)

        counts = rows.present.sum(0).float()  # [R]
        if config.mean_over == "positions":
            weight = counts.new_full((), len(rows.supervised))
        else:
            weight = task.row_weights.sum() / sum(config.step_weights)
        tokens = target_tokens(model.d2t)
        hits = tokens[found.best] == rows.batch["target_argmax"][rows.labels][:, None]
        return StepOutput(loss_sum, weight, self._metrics(rows, hits & rows.present, found))

    def _metrics(self, rows: Rows, hits: Tensor, found: SoftRows) -> dict[str, Ratio]:
        """Return what the draft would get right, and would get accepted.

        accuracy_k: of the rows of step k that are trained, those whose best token is the
        target's.  acceptance_rate: sum of min(p, q) over the draft vocabulary, mean over trained
        rows.  acceptance_length counts the verified token too: 1 + the hits before the first
        miss, at most draft_tokens, over the rows whose last and first drafted token are both an
        answer's.  A target token outside of the draft vocabulary and the end of what is
        supervised are misses.
        """
        present = rows.present
        right, total = hits.sum(0).float(), present.sum(0).float()
        accepted = rows.prefix_hits(hits & rows.answers[:, None]).clamp(max=self.draft_tokens)
        metrics = {
            "acceptance_rate": Ratio((found.overlaps * present).sum(), total.sum()),
            "acceptance_length": Ratio(
                ((1 + accepted) * rows.starts).sum().float(), rows.starts.sum().float()
            ),
            "in_draft_vocab": Ratio(total[0], rows.supervised.sum().float()),
        }
        metrics |= {f"accuracy_{k + 1}": Ratio(right[k], total[k]) for k in range(len(total))}
        return metrics
