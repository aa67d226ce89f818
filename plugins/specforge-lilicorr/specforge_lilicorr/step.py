"""The training objective: DFlash's for the head, and what picks the path through the lattice.

Shapes: L lattices, one of each block, D slots of each, K candidates of a slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_dflash.model import Frozen, parts
from specforge_dflash.step import BlockStep, mean_divisor, slot_weights, teachers
from specforge_dflash2.step import path_metrics
from torch import Tensor

from specforge_core.types import Batch, Draft, Ratio, StepContext, StepOutput

from .config import LiLiCorrConfig
from .model import LiLiCorrModel


class LiLiCorrStep(BlockStep[LiLiCorrConfig]):
    """Loss and metrics of one micro-batch."""

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput:
        config, (model, frozen) = self.config, parts(draft, LiLiCorrModel)
        losses, best, ids, scores = model(batch, frozen)
        labels, valid = (batch[name].flatten(0, 1)[:, 1:] for name in ("labels", "valid"))
        hits = ids.view(*labels.shape, -1) == labels[..., None]
        found = hits.any(-1) & valid  # the label of a slot without one is token 0
        # drafting comes by the true token no more behind a slot without it
        reached = found.cumprod(dim=1).bool()
        trained = reached & valid.all(dim=1, keepdim=True)
        gold = hits.int().argmax(-1)
        terms = self._terms(ids, scores, gold.flatten(), batch, frozen)
        losses = losses.view(labels.shape) * valid
        weights, total = slot_weights(config, losses.detach(), valid)
        average = mean_divisor(config, valid.shape[1])
        loss, count = (weights * losses).sum(), trained.sum().float()
        right = reached & (scores.argmax(-1).view(labels.shape) == gold)
        base = best.view(labels.shape) == labels
        top_k = config.candidate_top_k
        metrics = path_metrics(losses.detach(), right, base, found, valid, top_k)
        metrics["trained"] = Ratio(num=count, den=valid.sum().float())
        for name, (weight, term) in terms.items():
            spent = (term.view(labels.shape) * trained).sum()
            loss = loss + weight * average * spent
            metrics[f"lattice_{name}"] = Ratio(num=spent.detach(), den=count)
        return StepOutput(loss_sum=loss, weight=total, metrics=metrics)

    def _terms(
        self, ids: Tensor, scores: Tensor, gold: Tensor, batch: Batch, frozen: Frozen
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the terms that are wanted: weight, and value in every slot [R].

        Of candidates ids [R, K] with these scores [R, K]; the true one is at `gold` [R].
        """
        config = self.config
        terms = {"ce": (config.ce_weight, F.cross_entropy(scores, gold, reduction="none"))}
        if config.margin_weight:
            own = scores.gather(1, gold[:, None])
            others = scores.scatter(1, gold[:, None], float("-inf")).amax(1)
            lacking = torch.relu(config.margin - (own.squeeze(1) - others))
            terms["margin"] = config.margin_weight, lacking
        if config.penalty_weight:
            with torch.no_grad():
                finals = batch["final"].flatten(0, 1)[teachers(config, batch).flatten()]
                size = config.head_chunk
                chunks = zip(torch.split(finals, size), torch.split(ids, size), strict=True)
                logits = torch.cat([token_logits(frozen, *chunk) for chunk in chunks])
                gaps = torch.relu(logits.gather(1, gold[:, None]) - logits)
            spread = torch.softmax(scores, dim=1)
            terms["penalty"] = config.penalty_weight, (spread * gaps).sum(1)
        return terms


def token_logits(frozen: Frozen, finals: Tensor, ids: Tensor) -> Tensor:
    """Return the target's logits [n, K] float32 for tokens [n, K] behind final states [n, H].

    They multiply the K rows of the head alone.
    """
    rows = F.embedding(ids, frozen.lm_head)
    found = torch.matmul(rows, frozen.states(finals).to(rows.dtype)[..., None]).squeeze(-1)
    return frozen.own_logits(found.float())
