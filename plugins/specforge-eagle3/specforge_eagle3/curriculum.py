"""What is trained early in a run: less hard labels, and fewer steps, after EDSD's curriculum.

Shapes: U labels, R steps, D documents, H hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_core.target.head import widen
from specforge_core.types import Batch, StepContext

from .config import Eagle3Config


def narrowed(
    config: Eagle3Config,
    batch: Batch,
    teacher_head: Tensor,
    softcap: float | None,
    ctx: StepContext,
) -> Batch:
    """Return the batch with the steps and the row weights of that part of the training.

    Validation is as at a run's end, where nothing is left out.  The device is not waited for.
    """
    progress = ctx.progress if ctx.training else 1.0
    steps, share = steps_at(config, progress), hard_share_at(config, progress)
    out = dict(batch)
    for name in ("students", "present", "row_weights"):
        out[name] = batch[name][:, :steps]
    if share > 0:
        hardness = entropies(batch["final"], teacher_head, softcap, config.head_chunk)
        document = torch.searchsorted(
            batch["bounds"].long(), batch["students"][:, 0].contiguous(), right=True
        )
        kept = easiest(hardness, document, len(batch["bounds"]), share)
        out["row_weights"] = out["row_weights"] * kept[:, None]
    return out


def steps_at(config: Eagle3Config, progress: float) -> int:
    """Return how many steps are trained: 1 at first, all from progress `grow_steps` on."""
    if progress >= config.grow_steps:
        return config.steps
    return min(config.steps, 1 + int(progress / config.grow_steps * config.steps))


def hard_share_at(config: Eagle3Config, progress: float) -> float:
    """Return the part of the labels that is left out: `hard_share`, falling to 0."""
    return config.hard_share * max(0.0, 1 - progress / config.hard_until)


@torch.no_grad()
def entropies(states: Tensor, head: Tensor, softcap: float | None, chunk: int) -> Tensor:
    """Return the entropy [U] float32 of each label's distribution over the draft vocabulary."""
    found = []
    for part in torch.split(states, max(1, chunk // 4)):  # four tensors of this size at once
        scores = (widen(part.to(head.dtype), head.shape[1]) @ head.t()).float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        log_p = scores.log_softmax(dim=-1)
        found.append(-(log_p.exp() * log_p).sum(dim=-1))
    return torch.cat(found)


def easiest(hardness: Tensor, document: Tensor, count: int, share: float) -> Tensor:
    """Say which labels [U] are kept: in each document all but its hardest `share`, rounded down.

    `document` [U] holds numbers up to `count`.  By document, so that any split of a batch adds up.
    """
    order = hardness.argsort(stable=True)
    order = order[document[order].argsort(stable=True)]
    sizes = document.new_zeros(count + 1).index_add_(0, document, torch.ones_like(document))
    begins = sizes.cumsum(0) - sizes
    place = torch.arange(len(order), device=order.device) - begins[document[order]]
    kept = place < (sizes.double() * (1 - share)).ceil()[document[order]]
    return torch.empty_like(kept).index_copy_(0, order, kept)
