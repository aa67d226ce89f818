"""Attention of elements: depth-0 keys of rows up to their own, and their row's own deeper keys.

Of the latter those of depths up to their own.

Two paths: flex attention on a GPU, which skips the tiles that nothing sees, and eager, which
scores depth-0 keys and own keys apart; on a CPU in one document after the other.
Shapes: N tokens, M deeper elements, E = N + M, h heads, v key/value heads of g = h / v heads
each, d head size, i own keys.
"""

from __future__ import annotations

import torch
from specforge_dflash.attention import TILE, attend, ordered
from specforge_eagle3.attention import eager
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_core.types import DOCUMENT_IDS, Batch

MIN_HEAD_DIM = 16  # of flex attention's kernels


class Elements:
    """Who sees whom.  No dataclass: FSDP's mixed precision casts the tensors in those."""

    def __init__(self, batch: Batch) -> None:
        self.documents = batch[DOCUMENT_IDS][0]  # [N]
        self.anchors, self.depth = batch["anchors"], batch["depth"]  # [E]
        self.own, self.sizes = batch["own"], batch["sizes"]  # [M, i], [D, 2]
        self._mask: BlockMask | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, path: str) -> Tensor:
        """Return [E, h, d] for queries [E, h, d], keys and values [E, v, d]."""
        if path == "auto" and q.is_cuda and q.shape[-1] >= MIN_HEAD_DIM:
            if self._mask is None:
                self._mask = block_mask(self.documents, self.anchors, self.depth)
            count = len(self.documents)
            by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
            keys, values = ((x[:, :, :count], x[:, :, count:]) for x in by_head[1:])
            out = attend(by_head[0], (keys[0], values[0]), (keys[1], values[1]), self._mask)
            return out[0].transpose(0, 1)
        sizes = [[len(self.documents), len(self.own)]]
        return self._eager(q, k, v, sizes if q.is_cuda else self.sizes.tolist())

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, sizes: list[list[int]]) -> Tensor:
        """Attend in each of the stretches of so many tokens and deeper elements."""
        count, parts, deeper = len(self.documents), [], []
        number = torch.arange(self.own.shape[1], device=q.device)
        first, low = 0, 0
        for tokens, more in sizes:
            rows, rest = slice(first, first + tokens), slice(count + low, count + low + more)
            own = self.own[low : low + more]
            kept = number < self.depth[rest, None]
            seen = (
                self._seen(self.anchors[part], slice(first, first + tokens))
                for part in (rows, rest)
            )
            keys = k[rows], v[rows]
            parts.append(eager(q[rows], keys, None, next(seen)))
            mine = k[own].transpose(0, 1), v[own].transpose(0, 1)
            deeper.append(eager(q[rest], keys, mine, next(seen), kept))
            first, low = first + tokens, low + more
        return torch.cat([*parts, *deeper])

    def _seen(self, anchors: Tensor, rows: slice) -> Tensor:
        """Say which of the rows' depth-0 keys elements of these anchors see."""
        number = torch.arange(rows.start, rows.stop, device=anchors.device)
        same = self.documents[anchors][:, None] == self.documents[rows]
        return same & (anchors[:, None] >= number)


def block_mask(documents: Tensor, anchors: Tensor, depth: Tensor) -> BlockMask:
    """Return flex attention's mask over the elements of documents [N], anchors and depth [E].

    Which tiles are empty, partly or wholly visible follows from what ranges of documents, rows
    and depths they hold; nothing of size E x E is made, and the device is not waited for.
    """
    of = documents[anchors]

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        before = (depth[kv] == 0) & (anchors[q] >= anchors[kv]) & (of[q] == of[kv])
        return before | ((anchors[q] == anchors[kv]) & (depth[q] >= depth[kv]))

    rows, low, high = len(anchors), {}, {}
    tiles = -(-rows // TILE)
    for name, values in (("anchor", anchors), ("depth", depth), ("document", of)):
        padded = torch.cat([values, values[-1:].expand(tiles * TILE - rows)]).view(tiles, TILE)
        low[name], high[name] = padded.amin(1), padded.amax(1)

    def queries(bounds: dict[str, Tensor], name: str) -> Tensor:
        return bounds[name][:, None]

    first = (low["depth"] == 0) & (queries(high, "anchor") >= low["anchor"])
    first &= (queries(high, "document") >= low["document"]) & (
        queries(low, "document") <= high["document"]
    )
    own = (high["depth"] > 0) & (queries(high, "depth") >= low["depth"])
    own &= (queries(high, "anchor") >= low["anchor"]) & (queries(low, "anchor") <= high["anchor"])
    wholly = (high["depth"] == 0) & (queries(low, "anchor") >= high["anchor"])
    wholly &= (queries(low, "document") == high["document"]) & (
        queries(high, "document") == low["document"]
    )
    wholly[:, -1] = False  # it may be short
    partly = (first | own) & ~wholly
    return BlockMask.from_kv_blocks(
        *ordered(partly[None, None]),
        *ordered(wholly[None, None]),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(rows, rows),
    )
