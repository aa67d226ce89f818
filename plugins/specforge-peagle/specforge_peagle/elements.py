"""One batch as the objective sees it: the rows of the tokens, and deeper elements behind them.

Element e < N is row e at depth 0; the others are the kept depths of the rows, by document, depth
and row.  Shapes: N tokens of all documents, M deeper elements, E = N + M, K depths,
V elements that are trained, U labels, B and S rows and columns of the batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from specforge_dflash.mask_token import mask_token_occurs
from specforge_eagle3.rows import FIELDS, Tokens, pack_fields
from torch import Tensor

from specforge_core.errors import DataError
from specforge_core.types import Batch, Sample

from .config import PeagleConfig
from .dropping import DEPTHS, WHOLE

ALL_FIELDS = (*FIELDS, DEPTHS, WHOLE)


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
    anchors, depth, own = _elements(flat[DEPTHS], documents)
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
        "own": own,
        "trained": trained,
        "supervised": supervised,
        "labels": labels,
    }


def _elements(depths: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return anchors and depth [E], and own [M, K']."""
    count, most, rows = len(depths), int(depths.max()), torch.arange(len(depths))
    anchors = rows.repeat_interleave(depths + 1)
    depth = torch.arange(len(anchors)) - (rows + depths.cumsum(0) - depths)[anchors]
    order = (documents[anchors] * (most + 1) + depth).masked_fill_(depth == 0, -1)
    order = order.argsort(stable=True)
    anchors, depth = anchors[order], depth[order]
    number = torch.zeros(most + 1, count, dtype=torch.int64)  # of the element, where there is one
    number[depth, anchors] = torch.arange(len(anchors))
    return anchors, depth, number[1:, anchors[count:]].t().contiguous()
