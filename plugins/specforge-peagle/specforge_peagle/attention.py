"""Attention of elements: depth-0 keys of rows up to their own, and their row's own deeper keys.

Of the latter those of depths up to their own.

Two paths: flex attention on a GPU, which skips the tiles that nothing sees, and eager, which
scores depth-0 keys and own keys apart.
Shapes: N tokens, M deeper elements, E = N + M, h heads, v key/value heads of g = h / v heads
each, d head size, i own keys.
"""

from __future__ import annotations

import torch
from specforge_dflash.attention import TILE, attend, tiled_mask
from specforge_dflash.model import MIN_HEAD_DIM
from specforge_eagle3.attention import eager
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_core.types import DOCUMENT_IDS, Batch


class Elements:
    """Who sees whom.  No dataclass: FSDP's mixed precision casts the tensors in those."""

    def __init__(self, batch: Batch) -> None:
        self.documents = batch[DOCUMENT_IDS][0]  # [N]
        self.anchors, self.depth = batch["anchors"], batch["depth"]  # [E]
        self.own = batch["own"]  # [M, i]
        self._mask: BlockMask | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, path: str) -> Tensor:
        """Return [E, h, d] for queries [E, h, d], keys and values [E, v, d]."""
        count = len(self.documents)
        if path == "auto" and q.is_cuda and q.shape[-1] >= MIN_HEAD_DIM:
            if self._mask is None:
                self._mask = block_mask(self.documents, self.anchors, self.depth)
            by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
            keys, values = ((x[:, :, :count], x[:, :, count:]) for x in by_head[1:])
            out = attend(by_head[0], (keys[0], values[0]), (keys[1], values[1]), self._mask)
            return out[0].transpose(0, 1)
        seen = self.documents[self.anchors][:, None] == self.documents
        seen &= self.anchors[:, None] >= torch.arange(count, device=q.device)
        number = torch.arange(self.own.shape[1], device=q.device)
        first, kept = (k[:count], v[:count]), number < self.depth[count:, None]
        mine = k[self.own].transpose(0, 1), v[self.own].transpose(0, 1)
        rows = eager(q[:count], first, None, seen[:count])
        return torch.cat([rows, eager(q[count:], first, mine, seen[count:], kept)])


def block_mask(documents: Tensor, anchors: Tensor, depth: Tensor) -> BlockMask:
    """Return flex attention's mask over the elements of documents [N], anchors and depth [E].

    Which tiles are empty, partly or wholly visible follows from what ranges of documents, rows
    and depths they hold; nothing of size E x E is made, and the device is not waited for.
    """
    of, rows = documents[anchors], len(anchors)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        before = (depth[kv] == 0) & (anchors[q] >= anchors[kv]) & (of[q] == of[kv])
        return before | ((anchors[q] == anchors[kv]) & (depth[q] >= depth[kv]))

    tiles = -(-rows // TILE)
    values = torch.stack([anchors, depth, of])
    padded = torch.cat([values, values[:, -1:].expand(-1, tiles * TILE - rows)], dim=1)
    by_tile = padded.view(3, tiles, TILE)
    low, high = by_tile.amin(2), by_tile.amax(2)
    # of a query tile some, or all, have no less than some, or all, of a key tile
    some_row, some_depth, some_document = high[:, :, None] >= low[:, None]
    every_row, _, every_document = low[:, :, None] >= high[:, None]
    rows_meet, documents_meet = some_row & some_row.t(), some_document & some_document.t()
    partly = (low[1] == 0) & some_row & documents_meet
    partly |= (high[1] > 0) & some_depth & rows_meet
    wholly = (high[1] == 0) & every_row & every_document & every_document.t()
    wholly[:, -1] = False  # it may be short
    return tiled_mask(visible, partly[None, None], wholly[None, None], rows, rows)
