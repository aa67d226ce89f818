"""Which places are trained at which depth: drawn for a sample, found in a batch, who sees whom.

Row a reads the feature of token a and the embedding of token a+1.  Depth d of it predicts the
token after position u = a+1+d, without the tokens in between; it is trained where that label is
supervised, and so are those of the depths from 1 to d before it.  Depth 0 is trained at every row.
Element e < N of a batch is row e at depth 0; the others are the kept depths of the rows, by
document, depth and row.  Shapes: T tokens of a sample, N of all, E elements, V of them that are
trained, B and S rows and columns of the batch, h heads, v key/value heads, d head size.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from specforge_dflash.attention import MIN_HEAD_DIM, TILE, attend, tiled_mask
from specforge_dflash.mask_token import mask_token_occurs
from specforge_eagle3.attention import eager
from specforge_eagle3.rows import FIELDS, Tokens
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_core.errors import DataError
from specforge_core.types import POSITION_IDS, Batch, Sample

from .config import PeagleConfig

DEPTHS, WHOLE = "depths", "whole"  # the fields that the transform adds
ALL_FIELDS = (*FIELDS, DEPTHS, WHOLE)


def draw_depths(config: PeagleConfig, labels: Tensor, generator: torch.Generator) -> Sample:
    """Draw how deep each row of a sample goes, by its supervised labels [T] bool.

    Returns `depths` [T] int64, the depths of each row above 0 that are kept, and `whole` [T] bool,
    the rows of which none was dropped by chance, whichever there are: a fair part of all rows,
    by which acceptance is simulated.

    Depth d may be kept where depth d-1 was, and its label is supervised.  Of these rows, n labels
    being supervised, int((n - d) max(keep_ratio^d, keep_least)) are kept, chosen uniformly; all
    of them where that ratio is 1.  One order of the rows decides at every depth: among the rows
    that are left it is as random as a new one.
    """
    total = int(labels.sum())
    rank = torch.randperm(len(labels), generator=generator)
    rows = rank.argsort()  # that are kept, in this order
    later = F.pad(labels, (0, config.depths))
    depths, whole = torch.zeros_like(rank), torch.ones_like(labels)
    for d in range(1, config.depths):
        rows = rows[later[rows + 1 + d]]
        ratio = max(config.keep_ratio**d, config.keep_least)
        count = max(int((total - d) * ratio), 0)
        if ratio < 1 and count < len(rows):
            whole &= rank < rank[rows[count]]  # this one and those of higher ranks are dropped
            rows = rows[:count]
        depths[rows] = d
    return {DEPTHS: depths, WHOLE: whole}


def find_elements(t2d: Tensor, config: PeagleConfig, mask_token_id: int, batch: Batch) -> Batch:
    """Find the elements of a packed or padded batch [B, S], and which of them are trained.

    `t2d` [vocabulary] bool, on the CPU, is the draft vocabulary.
    The result has no padding.  As EAGLE-3's `label_rows` describes them: what is by token, the
    rows of `starts` only where nothing was dropped, and final, choices, logsumexp and answers by
    label.  Besides
        inputs      [N + 1] int64: the token after each row's but the last, then the mask token
        anchors     [E] int64, the row of each element
        depth       [E] int64
        number      [depths, N] int64: the element of each depth and row; any where there is none
        trained     [V] int64: the elements whose label is supervised and can be drafted
        supervised  [E] bool: the element's label is supervised, drafted or not
        labels      [V] int64: which of the labels each predicts
    States may be on another device than all else, which is on the CPU.
    Raises DataError when the mask token occurs.
    """
    tokens = Tokens(batch, ALL_FIELDS, config.mask_on)
    flat = tokens.flat
    if bool((flat["input_ids"] == mask_token_id).any()):
        given, where = config.mask_token_id, "the training data"
        raise DataError(mask_token_occurs(mask_token_id, given, where))
    kept = torch.arange(int(flat[DEPTHS].max()) + 1)[:, None] <= flat[DEPTHS]  # [depths, N]
    depth, anchors = kept.nonzero(as_tuple=True)
    # a document's side by side: attention then looks into fewer tiles
    order = tokens.documents[anchors].masked_fill_(depth == 0, 0).argsort(stable=True)
    depth, anchors = depth[order], anchors[order]
    number = torch.zeros_like(kept, dtype=torch.int64)
    number[depth, anchors] = torch.arange(len(anchors))
    places = anchors + depth + 1  # of the labels; no document begins with one, and none is at N
    supervised = F.pad(tokens.asked, (0, 1))[places]
    drafted = F.pad(t2d[flat["target_argmax"]], (0, 1))[places]
    trained = (supervised & drafted).nonzero().squeeze(1)
    used, labels = torch.unique(places[trained], return_inverse=True)
    return {
        **tokens.by_token(starts=tokens.starts & flat[WHOLE]),
        **tokens.by_label(used),
        "inputs": F.pad(flat["input_ids"][1:], (0, 2), value=mask_token_id),
        "anchors": anchors,
        "depth": depth,
        "number": number,
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

    def __init__(self, batch: Batch, path: str) -> None:
        self.path = path
        self.anchors, self.depth, self.number = (batch[n] for n in ("anchors", "depth", "number"))
        self.trained = batch["trained"]
        position = batch[POSITION_IDS][0][self.anchors]
        self.begins = self.anchors - position  # [E], the first row of its document
        self.places = position + self.depth  # [E], in its document

    def attend(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [E, h, d] for queries [E, h, d], keys and values [E, v, d], in any layer."""
        if self.path == "auto" and q.is_cuda and q.shape[-1] >= MIN_HEAD_DIM:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return attend(q, (k[:, :, :0], v[:, :, :0]), (k, v), self.mask)[0].transpose(0, 1)
        count = self.number.shape[1]
        rows, own = self.anchors[:count], self.number[1:, self.anchors[count:]]
        seen = (self.begins[:, None] <= rows) & (rows <= self.anchors[:, None])
        kept = torch.arange(len(own), device=q.device) < self.depth[count:, None]
        first, mine = (k[:count], v[:count]), (k[own], v[own])
        shallow = eager(q[:count], first, None, seen[:count])
        return torch.cat([shallow, eager(q[count:], first, mine, seen[count:], kept)])

    @cached_property
    def mask(self) -> BlockMask:
        """Flex attention's mask over the elements.

        Which tiles are empty, partly or wholly visible follows from what ranges of rows, depths
        and beginnings they hold; nothing of size E x E is made, and the device is not waited for.
        """
        anchors, depth, begins, count = self.anchors, self.depth, self.begins, len(self.depth)

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            before = (depth[kv] == 0) & (begins[q] <= anchors[kv]) & (anchors[kv] <= anchors[q])
            return before | ((anchors[q] == anchors[kv]) & (depth[q] >= depth[kv]))

        # [3, tiles]; a short tile has the last element more than once
        padded = torch.arange(-(-count // TILE) * TILE, device=depth.device).clamp_(max=count - 1)
        least, most = torch.stack([anchors, depth, begins])[:, padded.view(-1, TILE)].aminmax(dim=2)
        (row, shallow, _), (last_row, deep, _) = least, most  # of keys; then of queries
        (q_row, _, q_begin), (q_last_row, q_deep, q_last_begin) = least[..., None], most[..., None]
        partly = (row <= q_last_row) & (last_row >= q_begin) & (shallow == 0)
        partly |= (row <= q_last_row) & (last_row >= q_row) & (shallow <= q_deep)
        wholly = (deep == 0) & (row >= q_last_begin) & (last_row <= q_row)
        wholly[:, -1] = False  # it may be short
        return tiled_mask(visible, partly[None, None], wholly[None, None], count, count)
