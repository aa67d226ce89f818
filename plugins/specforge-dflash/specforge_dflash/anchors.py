"""Where the training blocks of a sample start: all that is random in training.

Shapes: T tokens of a sample, A anchors of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.batches.collate import token_fields, truncate
from specforge_core.types import CaptureSpec, Sample

# fields that the transform adds
ANCHORS = "anchors"  # [A] int64, ascending
PREFIXES = "prefixes"  # [A] int64: the known tokens that each block begins with, where it varies


@dataclass(frozen=True, slots=True)
class DFlashTransform:
    """Cuts a sample to `max_length` tokens and draws its anchors; None where no block can start.

    Up to `num_anchors` distinct places are drawn, all equally likely.  With `prefix_weights`, of
    1, 2, ... known tokens, it is drawn for each block how many it begins with.
    """

    spec: CaptureSpec
    max_length: int
    num_anchors: int
    prefix_weights: tuple[float, ...] | None = None

    def __call__(self, sample: Sample, generator: torch.Generator, /) -> Sample | None:
        cut = truncate(sample, token_fields(self.spec), self.max_length)
        places = start_places(cut["loss_mask"])
        if not len(places):
            return None
        chosen = torch.randperm(len(places), generator=generator)[: self.num_anchors]
        drawn = {ANCHORS: places[chosen].sort().values}
        if self.prefix_weights is not None:
            weights = torch.tensor(self.prefix_weights, dtype=torch.float64)
            counts = torch.multinomial(weights, len(chosen), replacement=True, generator=generator)
            drawn[PREFIXES] = counts + 1
        return cut | drawn

    def rows(self, tokens: int, supervised: int, /) -> int:
        """Return the anchors of a sample, about: each answer's last token starts no block."""
        return min(supervised, self.num_anchors)


def start_places(loss_mask: Tensor) -> Tensor:
    """Return where in `loss_mask` [T] a block may start, ascending.

    At any supervised token whose successor is supervised too.  A block need not fit: slots
    beyond the end or on tokens that are not supervised are not trained.
    """
    kept = loss_mask.bool()
    return (kept[:-1] & kept[1:]).nonzero().squeeze(1)
