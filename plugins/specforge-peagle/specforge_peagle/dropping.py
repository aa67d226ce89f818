"""Which places are trained at which depth: all that is random in training.

Row a reads the feature of token a and the embedding of token a+1.  Depth d of it predicts the
token after position u = a+1+d, without the tokens in between; it is trained where that label is
supervised, and so are those of the depths from 1 to d before it.  Depth 0 is trained at every row.
Shapes: T tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from specforge_eagle3.adapter import Eagle3Transform, trained_labels
from torch import Tensor

from specforge_core.types import CaptureSpec, Sample

from .config import PeagleConfig

DEPTHS, WHOLE = "depths", "whole"  # the fields that the transform adds


@dataclass(frozen=True, slots=True)
class PeagleTransform:
    """Cuts a sample to `max_length` tokens, and draws how deep each row goes.

    It adds `depths` [T] int64, the depths of each row above 0 that are kept, and `whole` [T] bool,
    the rows of which none was dropped by chance, whichever there are: a fair part of all rows,
    by which acceptance is simulated.  None where no label is left.
    """

    config: PeagleConfig
    spec: CaptureSpec
    max_length: int

    def __call__(self, sample: Sample, generator: torch.Generator, /) -> Sample | None:
        mask_on = self.config.mask_on
        cut = Eagle3Transform(self.spec, self.max_length, mask_on)(sample, generator)
        if cut is None:
            return None
        depths, whole = drop(trained_labels(cut["loss_mask"], mask_on), self.config, generator)
        return cut | {DEPTHS: depths, WHOLE: whole}


def drop(labels: Tensor, config: PeagleConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `depths` and `whole` for the supervised labels [T] bool of one sample.

    Depth d may be kept where depth d-1 was, and its label is supervised.  Of these rows, n labels
    being supervised, int((n - d) max(keep_ratio^d, keep_least)) are kept, chosen uniformly; all
    of them where that ratio is 1.  One order of the rows decides at every depth: among the rows
    that are left it is as random as a new one.
    """
    length, total = len(labels), int(labels.sum())
    rank = torch.randperm(length, generator=generator)
    depths = torch.zeros(length, dtype=torch.int64)
    kept = torch.ones(length, dtype=torch.bool)
    limit = length  # rows of this rank and more were dropped somewhere
    for d in range(1, config.depths):
        there = F.pad(labels[1 + d :], (0, min(1 + d, length)))
        rows = (kept & there).nonzero().squeeze(1)
        ratio = max(config.keep_ratio**d, config.keep_least)
        count = max(int((total - d) * ratio), 0)
        if ratio < 1 and count < len(rows):
            rows = rows[rank[rows].argsort()]
            limit = min(limit, int(rank[rows[count]]))
            rows = rows[:count]
        kept = torch.zeros_like(kept).index_fill_(0, rows, True)
        depths += kept
    return depths, rank < limit
