"""Which places are trained at which depth: drawn for a sample, found in a batch, who sees whom.

Row a reads the feature of token a and the embedding of token a+1.  Depth d of it predicts the
token after position u = a+1+d, without the tokens in between; it is trained where that label is
supervised, and so are those of the depths from 1 to d before it.  Depth 0 is trained at every row.
Element e < N of a batch is row e at depth 0; the others are the kept depths of the rows, by
document, depth and row.  Shapes: T tokens of a sample, N of all, M deeper elements, E = N + M,
V elements that are trained, i own ones of a row, B and S rows and columns of the batch, h heads,
v key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from specforge_dflash.attention import TILE, attend, tiled_mask
from specforge_dflash.mask_token import mask_token_occurs
from specforge_dflash.model import MIN_HEAD_DIM
from specforge_eagle3.adapter import Eagle3Transform, trained_labels
from specforge_eagle3.attention import eager
from specforge_eagle3.rows import FIELDS, Tokens, pack_fields
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_core.errors import DataError
from specforge_core.types import DOCUMENT_IDS, Batch, CaptureSpec, Sample

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
    """Puts the samples of a batch behind each other, and finds elements: see `find_elements`.

    Raises CaptureError when samples lack a field, DataError when the mask token occurs.
    """

    config: PeagleConfig
    t2d: Tensor  # [vocabulary] bool, on the CPU: the draft vocabulary
    mask_token_id: int

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        batch = pack_fields(samples, ALL_FIELDS, "P-EAGLE")
        if bool((batch["input_ids"] == self.mask_token_id).any()):
            raise DataError(mask_token_occurs(self.mask_token_id, "the training data"))
        return find_elements(batch, self.t2d, self.config.mask_on, self.mask_token_id)


def find_elements(batch: Batch, t2d: Tensor, mask_on: str, mask_token_id: int) -> Batch:
    """Find the elements of a packed or padded batch [B, S], and which of them are trained.

    The result has no padding.  As EAGLE-3's `label_rows` describes them: what is by token, the
    rows of `starts` only where nothing was dropped, and final, choices, logsumexp and answers by
    label.  Besides
        inputs      [N + 1] int64: the token after each row's but the last, then the mask token
        anchors     [E] int64, the row of each element
        depth       [E] int64
        own         [M, i] int64: the elements of depths 1, 2, ... of the same row
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
    place = (anchors + depth + 1).clamp_(max=count - 1)
    there = (place > anchors + depth) & (documents[place] == documents[anchors])
    supervised = there & tokens.asked[place]
    trained = (supervised & t2d[flat["target_argmax"][place]]).nonzero().squeeze(1)
    used, labels = torch.unique(place[trained], return_inverse=True)
    return {
        **tokens.by_token(starts=tokens.starts & flat[WHOLE]),
        **tokens.by_label(used),
        "inputs": F.pad(flat["input_ids"][1:], (0, 2), value=mask_token_id),
        "anchors": anchors,
        "depth": depth,
        "own": number[1:, anchors[count:]].t().contiguous(),
        "trained": trained,
        "supervised": supervised,
        "labels": labels,
    }


class Elements:
    """Who sees whom: depth-0 keys of rows up to its own, and its row's own of depths up to its own.

    Two paths: flex attention on a GPU, which skips the tiles that nothing sees, and eager, which
    scores depth-0 keys and own keys apart.
    No dataclass: FSDP's mixed precision casts the tensors in those.
    """

    def __init__(self, batch: Batch) -> None:
        self.documents = batch[DOCUMENT_IDS][0]  # [N]
        self.anchors, self.depth = batch["anchors"], batch["depth"]  # [E]
        self.own = batch["own"]  # [M, i]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, path: str) -> Tensor:
        """Return [E, h, d] for queries [E, h, d], keys and values [E, v, d]."""
        count = len(self.documents)
        if path == "auto" and q.is_cuda and q.shape[-1] >= MIN_HEAD_DIM:
            by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
            keys, values = ((x[:, :, :count], x[:, :, count:]) for x in by_head[1:])
            out = attend(by_head[0], (keys[0], values[0]), (keys[1], values[1]), self.mask)
            return out[0].transpose(0, 1)
        seen = self.documents[self.anchors][:, None] == self.documents
        seen &= self.anchors[:, None] >= torch.arange(count, device=q.device)
        number = torch.arange(self.own.shape[1], device=q.device)
        first, kept = (k[:count], v[:count]), number < self.depth[count:, None]
        mine = k[self.own].transpose(0, 1), v[self.own].transpose(0, 1)
        rows = eager(q[:count], first, None, seen[:count])
        return torch.cat([rows, eager(q[count:], first, mine, seen[count:], kept)])

    @cached_property
    def mask(self) -> BlockMask:
        """Flex attention's mask over the elements.

        Which tiles are empty, partly or wholly visible follows from what ranges of documents, rows
        and depths they hold; nothing of size E x E is made, and the device is not waited for.
        """
        anchors, depth = self.anchors, self.depth
        of, rows = self.documents[anchors], len(anchors)

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
