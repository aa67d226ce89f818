"""Where the training blocks of a batch start, and what each of their slots is asked.

Shapes: b samples, T tokens, A anchors of each sample, B slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.errors import DataError

from .adapter import mask_token_occurs
from .config import DFlashConfig


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one batch.  Block i of a sample starts at its anchor's token."""

    anchors: Tensor  # [b, A] int64, ascending; 0 where `keep` is False
    keep: Tensor  # [b, A] bool: the rest is padding
    input_ids: Tensor  # [b, A, B]: the anchor's token, then mask tokens
    labels: Tensor  # [b, A, D], of the slots that draft; 0 where `valid` is False
    valid: Tensor  # [b, A, D] bool: the label exists and is supervised


def draw_blocks(
    config: DFlashConfig,
    mask_token_id: int,
    input_ids: Tensor,
    loss_mask: Tensor,
    generator: torch.Generator,
) -> Blocks:
    """Start blocks at up to `num_anchors` places of every sample, drawn without replacement.

    A block may start at any supervised token [b, T] whose successor is supervised too;
    it need not fit, since slots beyond the end or unsupervised are not trained.  Random
    numbers come from the CPU `generator`, so a run does not depend on its device.
    """
    supervised = loss_mask.bool()
    candidates = supervised[:, :-1] & supervised[:, 1:]
    # the one wait for the device in a step, before anything is queued on it
    found = torch.stack([candidates.sum(1).max(), (input_ids == mask_token_id).sum()]).tolist()
    if found[1]:
        raise DataError(mask_token_occurs(mask_token_id, "the training data"))
    count = max(1, min(config.num_anchors, found[0]))

    scores = torch.rand(candidates.shape, generator=generator).to(input_ids.device)
    picked, places = scores.masked_fill(~candidates, -1.0).topk(count, dim=1)
    length = input_ids.shape[1]
    anchors = places.masked_fill(picked < 0, length).sort(dim=1).values
    keep = anchors < length
    anchors = anchors.masked_fill(~keep, 0)
    return fill_blocks(config, mask_token_id, input_ids, supervised, anchors, keep)


def fill_blocks(
    config: DFlashConfig,
    mask_token_id: int,
    input_ids: Tensor,
    supervised: Tensor,
    anchors: Tensor,
    keep: Tensor,
) -> Blocks:
    """Return the inputs and labels of blocks that start at `anchors` [b, A]."""
    b, count = anchors.shape
    block_ids = input_ids.new_full((b, count, config.block_size), mask_token_id)
    block_ids[..., 0] = input_ids.gather(1, anchors)
    # the first slot that drafts predicts token a+1 in both layouts
    offsets = 1 + torch.arange(config.num_draft_tokens, device=input_ids.device)
    places = anchors[..., None] + offsets
    inside = places < input_ids.shape[1]
    flat = places.masked_fill(~inside, 0).flatten(1)
    valid = keep[..., None] & inside & supervised.gather(1, flat).view(places.shape)
    labels = input_ids.gather(1, flat).view(places.shape).masked_fill(~valid, 0)
    return Blocks(anchors, keep, block_ids, labels, valid)
