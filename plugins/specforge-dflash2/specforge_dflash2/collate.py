"""DFlash's batches, and the token before each slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge_core.types import Batch, Collate, Sample


@dataclass(frozen=True, slots=True)
class DFlash2Collate:
    """Adds `previous` [b, A, B], the true token before each slot; only where one is trained."""

    blocks: Collate

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        batch = self.blocks(samples)
        ids, valid = batch["input_ids"], batch["valid"]
        places = batch["anchors"][..., None] + torch.arange(-1, valid.shape[2] - 1)
        previous = ids.gather(1, places.masked_fill(~valid, 0).flatten(1)).view(valid.shape)
        return batch | {"previous": previous.masked_fill(~valid, 0)}
