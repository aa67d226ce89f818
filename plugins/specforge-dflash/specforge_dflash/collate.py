"""Samples to one batch, with its blocks: every size that depends on data is decided here.

Shapes: b rows of S tokens, A blocks of a row, B slots of a block, R slots that are trained.
Besides the tokens' fields a batch has

    anchors    [b, A]     where in its row each block starts, ascending in a row
    starts     [b, A]     where in its row the block's document starts
    block_ids  [b, A, B]  the token at the anchor, more of its document where prefixes vary, then
                          mask tokens
    prefixes   [b, A]     how many known tokens each block begins with; only where they vary
    labels     [b, A, B]  the token each slot predicts, or the target's own likeliest in its place;
                          0 where there is none
    valid      [b, A, B]  bool: the slot predicts a supervised token of its document
    rows       [R]        the slots that are valid, counted over all of b * A * B

A block sees the tokens from its document's start to before its anchor.  One that only fills a
row up has both at 0, so it sees none, and no valid slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge_core.batches.collate import pack, pad, token_fields
from specforge_core.errors import DataError
from specforge_core.types import Batch, CaptureSpec, Sample

from .adapter import CHOICES
from .anchors import ANCHORS, PREFIXES
from .config import DFlashConfig
from .mask_token import mask_token_occurs


@dataclass(frozen=True, slots=True)
class DFlashCollate:
    """Puts samples behind each other (`batches: packed`) or one in each row (`padded`)."""

    config: DFlashConfig
    spec: CaptureSpec
    mask_token_id: int

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        for sample in samples:
            # the capture may have been made with another mask token
            if bool((sample["input_ids"] == self.mask_token_id).any()):
                given, where = self.config.mask_token_id, "the training data"
                raise DataError(mask_token_occurs(self.mask_token_id, given, where))
        packed = self.config.batches == "packed"
        drawn = (ANCHORS, PREFIXES)
        tokens = [{n: x for n, x in sample.items() if n not in drawn} for sample in samples]
        batch = (pack if packed else pad)(tokens, token_fields(self.spec))
        lengths = [len(sample["input_ids"]) for sample in samples]
        begins = [sum(lengths[:i]) if packed else 0 for i in range(len(samples))]
        documents = [
            torch.stack(
                [
                    sample[ANCHORS] + begin,
                    *(torch.full_like(sample[ANCHORS], n) for n in (begin, begin + length)),
                    sample.get(PREFIXES, torch.ones_like(sample[ANCHORS])),
                ]
            )
            for sample, begin, length in zip(samples, begins, lengths, strict=True)
        ]  # of each the anchor, start, end and known tokens of its blocks, [4, its A]
        if packed:
            blocks = torch.cat(documents, dim=1)[:, None]
        else:
            blocks = pad_sequence([d.t() for d in documents], batch_first=True).permute(2, 0, 1)
        if not blocks.shape[2]:
            blocks = blocks.new_zeros(4, blocks.shape[1], 1)
        made = self._blocks(batch, *blocks)
        if any(PREFIXES in sample for sample in samples):
            made[PREFIXES] = blocks[3].clamp(min=1)
        return batch | made

    def _blocks(
        self, batch: Batch, anchors: Tensor, starts: Tensor, ends: Tensor, known: Tensor
    ) -> Batch:
        """Return the blocks' fields, from four tensors [b, A]."""
        ids, supervised = batch["input_ids"], batch["loss_mask"].bool()
        block_ids = ids.new_full((*anchors.shape, self.config.block_size), self.mask_token_id)
        slots = torch.arange(self.config.block_size)
        own = anchors[..., None] + slots
        given = ((slots < known[..., None]) & (own < ends[..., None])) | (slots == 0)
        own = ids.gather(1, own.masked_fill(~given, 0).flatten(1)).view(own.shape)
        block_ids = torch.where(given, own, block_ids)
        # the first slot that drafts predicts the token after the anchor, in both layouts
        places = anchors[..., None] + slots + 1 - self.config.first_slot
        asked = slots >= (self.config.first_slot + known.clamp(min=1) - 1)[..., None]
        inside = (places < ends[..., None]) & asked
        flat = places.masked_fill(~inside, 0).flatten(1)
        valid = inside & supervised.gather(1, flat).view(places.shape)
        if self.config.until_gap:
            valid &= (valid | ~asked).cumprod(dim=-1).bool()
        if CHOICES in self.spec.fields:  # said where the token before is read
            ids, flat = batch[CHOICES], (flat - 1).clamp(min=0)
        labels = ids.gather(1, flat).view(places.shape).masked_fill(~valid, 0)
        fields = {"anchors": anchors, "starts": starts, "block_ids": block_ids, "labels": labels}
        return train_slots({name: x.contiguous() for name, x in fields.items()}, valid)


def train_slots(batch: Batch, valid: Tensor) -> Batch:
    """Return the batch with only the slots of `valid` [b, A, B] trained.

    For a method that differs in what is trained: each of them must have a label.
    """
    return batch | {"valid": valid, "rows": valid.flatten().nonzero().squeeze(1)}
