"""Which places are trained at which depth, drawn for a sample, and put together for a batch.

Row a reads the feature of token a and the embedding of token a+1.  Depth d of it predicts the
token after position u = a+1+d, without the tokens in between; it is trained where that label is
supervised, and so are those of the depths from 1 to d before it.  Depth 0 is trained at every row.
Element e < N of a batch is row e at depth 0; the others are the kept depths of the rows, by
document, depth and row.  Shapes: T tokens of a sample, N of all, M deeper elements, E = N + M,
V elements that are trained, B and S rows and columns of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from specforge_dflash.mask_token import mask_token_occurs
from specforge_eagle3.adapter import Eagle3Transform, trained_labels
from specforge_eagle3.rows import FIELDS, Tokens, pack_fields
from torch import Tensor

from specforge_core.errors import DataError
from specforge_core.types import Batch, CaptureSpec, Sample

from .config import PeagleConfig

DEPTHS, WHOLE = "depths", "whole"  # the fields that the transform adds
ALL_FIELDS = (*FIELDS, DEPTHS, WHOLE)


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


@dataclass(frozen=True, slots=True)
class PeagleCollate:
    """Puts the samples of a batch behind each other, and finds elements and labels."""

    config: PeagleConfig
    t2d: Tensor  # [vocabulary] bool, on the CPU: the draft vocabulary
    mask_token_id: int

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        """Return what `elements` does.

        Raises CaptureError when samples lack a field, DataError when the mask token occurs.
        """
        batch = pack_fields(samples, ALL_FIELDS, "P-EAGLE")
        if bool((batch["input_ids"] == self.mask_token_id).any()):
            raise DataError(mask_token_occurs(self.mask_token_id, "the training data"))
        return elements(batch, self.t2d, self.config.mask_on, self.mask_token_id)


def elements(batch: Batch, t2d: Tensor, mask_on: str, mask_token_id: int) -> Batch:
    """Find the elements of a packed or padded batch [B, S], and which of them are trained.

    The result has no padding.  As EAGLE-3's `label_rows` describes them: what is by token, the
    rows of `starts` only where nothing was dropped, and final, choices, logsumexp and answers by
    label.  Besides
        inputs      [N + 1] int64: the token after each row's, then the mask token
        anchors     [E] int64, the row of each element
        depth       [E] int64
        own         [M, K'] int64: the elements of depths 1, 2, ... of the same row
        trained     [V] int64: the elements whose label is supervised and can be drafted
        supervised  [E] bool: the element's label is supervised, drafted or not
        labels      [V] int64: which of the labels each predicts
    States may be on another device than all else, which is on the CPU.
    """
    tokens = Tokens(batch, ALL_FIELDS, mask_on)
    flat, documents, count = tokens.flat, tokens.documents, len(tokens.documents)
    depths, rows = flat[DEPTHS], torch.arange(count)
    anchors = rows.repeat_interleave(depths + 1)
    depth = torch.arange(len(anchors)) - (rows + depths.cumsum(0) - depths)[anchors]
    order = documents[anchors] * (int(depths.max()) + 1) + depth
    order = order.masked_fill_(depth == 0, -1).argsort(stable=True)
    anchors, depth = anchors[order], depth[order]
    number = torch.zeros(int(depths.max()) + 1, count, dtype=torch.int64)
    number[depth, anchors] = torch.arange(len(anchors))  # of the element, where there is one
    place = anchors + depth + 1
    there = place < count
    place = place.clamp_(max=count - 1)
    there &= documents[place] == documents[anchors]
    supervised = there & tokens.asked[place]
    trained = (supervised & t2d[flat["target_argmax"][place]]).nonzero().squeeze(1)
    used, labels = torch.unique(place[trained], return_inverse=True)
    ids, mask = flat["input_ids"], torch.full((1,), mask_token_id)
    return {
        **tokens.by_token(starts=tokens.starts & flat[WHOLE]),
        **tokens.by_label(used),
        "inputs": torch.cat([ids[1:], ids[:1], mask]),
        "anchors": anchors,
        "depth": depth,
        "own": number[1:, anchors[count:]].t().contiguous(),
        "trained": trained,
        "supervised": supervised,
        "labels": labels,
    }
