"""DFlash's batches, and the lattices of their blocks.

A lattice has the D = B - 1 slots of a block that draft, those without a label too: candidates of
all slots see each other, when drafting as in training.  One is made for each of the L blocks that
have a label.  With S tokens a row, a batch has besides

    lattices     [L]     the blocks with a lattice, counted over all of b * A
    slot_labels  [L, D]  the token each slot predicts; 0 where there is none
    slot_valid   [L, D]  bool: the slot has a supervised label
    before       [L]     the token before the anchor, counted over all of b * S
    anchored     [L]     bool: there is such a token in the document
    teachers     [L, D]  whose final state gives the target's logits for a slot: the token before
                         the slot's label, counted over all of b * S
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge_core.types import Batch, Collate, Sample


@dataclass(frozen=True, slots=True)
class LiLiCorrCollate:
    """Puts samples together, with their blocks."""

    blocks: Collate

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        batch = self.blocks(samples)
        rows, length = batch["input_ids"].shape
        valid = batch["valid"][..., 1:].flatten(0, 1)
        lattices = valid.any(dim=1).nonzero().squeeze(1)
        if not len(lattices):
            lattices = torch.zeros(1, dtype=torch.int64)  # no loss, but gradients of zeros
        begins = torch.arange(rows)[:, None] * length
        anchors, starts = ((batch[n] + begins).flatten()[lattices] for n in ("anchors", "starts"))
        places = anchors[:, None] + torch.arange(valid.shape[1])
        return batch | {
            "lattices": lattices,
            "slot_labels": batch["labels"][..., 1:].flatten(0, 1)[lattices],
            "slot_valid": valid[lattices],
            "before": (anchors - 1).clamp(min=0),
            "anchored": anchors > starts,
            "teachers": places.clamp(max=rows * length - 1),
        }
