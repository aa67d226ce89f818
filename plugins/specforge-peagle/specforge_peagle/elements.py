"""One batch as the objective sees it: the rows of the tokens, and deeper elements behind them.

Element e < N is row e at depth 0; the others are the kept depths of the rows, by document, depth
and row.  Shapes: N tokens of all documents, D documents, M deeper elements, E = N + M, K depths,
V elements that are trained, U labels, B and S rows and columns of the batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from specforge_dflash.mask_token import mask_token_occurs
from specforge_eagle3.adapter import trained_labels
from specforge_eagle3.rows import FIELDS
from torch import Tensor

from specforge_core.batches.collate import flat_rows, pack
from specforge_core.batches.loader import to_device
from specforge_core.errors import CaptureError, DataError
from specforge_core.types import DOCUMENT_IDS, POSITION_IDS, Batch, Sample

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
        if missing := [n for n in ALL_FIELDS if any(n not in s for s in samples)]:
            raise CaptureError(
                f"the captured samples have no {', '.join(missing)}, which P-EAGLE trains on. "
                "Capture again into an empty directory: specforge capture -c RUN.yaml"
            )
        if any(bool((s["input_ids"] == self.mask_token_id).any()) for s in samples):
            raise DataError(mask_token_occurs(self.mask_token_id, "the training data"))
        chosen = [{name: sample[name] for name in ALL_FIELDS} for sample in samples]
        return elements(pack(chosen, ALL_FIELDS), self.t2d, self.config.mask_on, self.mask_token_id)


def elements(batch: Batch, t2d: Tensor, mask_on: str, mask_token_id: int) -> Batch:
    """Find the elements of a packed or padded batch [B, S], and which of them are trained.

    The result has no padding.  By token [1, N]: input_ids, hidden_states, document_ids,
    position_ids, and
        starts      bool: a draft is simulated from this row
    and besides
        inputs      [N + 1] int64: the token after each row's, then the mask token
        anchors     [E] int64, the row of each element
        depth       [E] int64
        own         [M, K'] int64: the elements of depths 1, 2, ... of the same row
        sizes       [D, 2] int64: the tokens and the deeper elements of each document
        trained     [V] int64: the elements whose label is supervised and can be drafted
        supervised  [E] bool: the element's label is supervised, drafted or not
        labels      [V] int64: which of the labels each predicts
        final       [U, H], choices [U] int64, logsumexp [U] float32, answers [U] bool
    as EAGLE-3 has them.  States may be on another device than all else, which is on the CPU.
    """
    flat, documents = flat_rows(batch, (*ALL_FIELDS, POSITION_IDS))
    count, choices = len(documents), flat["target_argmax"]
    asked = trained_labels(flat["loss_mask"], mask_on, documents)
    _, tokens = torch.unique_consecutive(documents, return_counts=True)
    anchors, depth, own, deeper = _deeper(flat[DEPTHS], documents)
    place = anchors + depth + 1
    there = place < count
    place = place.clamp_(max=count - 1)
    there &= documents[place] == documents[anchors]
    supervised = there & asked[place]
    trained = (supervised & t2d[choices[place]]).nonzero().squeeze(1)
    used, labels = torch.unique(place[trained], return_inverse=True)
    within = trained_labels(flat["loss_mask"], "label", documents)
    starts = torch.zeros(count, dtype=torch.bool)
    starts[:-1] = (asked & within & flat["loss_mask"].bool())[1:]
    final = flat["final"]
    by_token = {
        **{name: flat[name] for name in ("input_ids", "hidden_states", POSITION_IDS)},
        DOCUMENT_IDS: documents,
        "starts": starts & flat[WHOLE],
    }
    mask = torch.full((1,), mask_token_id)
    return {
        **{name: tensor[None] for name, tensor in by_token.items()},
        "inputs": torch.cat([flat["input_ids"][1:], flat["input_ids"][:1], mask]),
        "anchors": anchors,
        "depth": depth,
        "own": own,
        "sizes": torch.stack([tokens, deeper], 1),
        "trained": trained,
        "supervised": supervised,
        "labels": labels,
        "final": final[to_device({"used": used}, final.device)["used"]],
        "choices": choices[used],
        "logsumexp": flat["target_logsumexp"][used],
        "answers": within[used],
    }


def _deeper(depths: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return anchors and depth [E], own [M, K'] and how many of the M each document has [D]."""
    count, most = len(depths), int(depths.max())
    rows = [(depths >= d).nonzero().squeeze(1) for d in range(1, most + 1)]
    none = depths.new_empty(0)
    anchors = torch.cat([none, *rows])
    depth = torch.cat([none, *(torch.full_like(r, d) for d, r in enumerate(rows, 1))])
    order = documents[anchors].argsort(stable=True)
    anchors, depth = anchors[order], depth[order]
    number = torch.zeros(most + 1, count, dtype=torch.int64)  # of the element, where there is one
    number[depth, anchors] = count + torch.arange(len(anchors))
    own = number[1:, anchors].t().contiguous()
    ids, firsts = torch.unique_consecutive(documents, return_inverse=True)
    deeper = torch.bincount(firsts[anchors], minlength=len(ids))
    whole = torch.arange(count)
    return torch.cat([whole, anchors]), torch.cat([whole * 0, depth]), own, deeper
