"""DFlash's batches, with what DSpark's objective reads besides.

Only the slots of a block up to its first one without a supervised label are trained: behind a
gap nothing drafted is accepted.  A batch has one more field

    teachers  [R]  whose final state gives the target's distribution for a trained slot, counted
                   over all of b * S: the token before the slot's label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from specforge_dflash import train_slots
from specforge_dflash.collate import DFlashCollate

from specforge_core.types import Batch, Sample


@dataclass(frozen=True, slots=True)
class DSparkCollate:
    """Puts samples together, with their blocks."""

    blocks: DFlashCollate

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        batch, first = self.blocks(samples), self.blocks.config.first_slot
        valid = batch["valid"].clone()
        valid[..., first:] = valid[..., first:].cumprod(dim=-1).bool()
        batch = train_slots(batch, valid)
        rows, length = batch["input_ids"].shape
        within = torch.arange(valid.shape[-1]) - first
        begins = torch.arange(rows)[:, None, None] * length
        places = batch["anchors"][..., None] + within + begins
        return batch | {"teachers": places.flatten()[batch["rows"]]}
