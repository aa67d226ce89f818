"""Who sees whom: the eager form against all pairs, and the tiles of flex attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from specforge_peagle.elements import Elements
from torch import Tensor


def made(kit: Any) -> tuple[Elements, Tensor]:
    """Return elements of three documents, and whom each of them sees [E, E]."""
    tiny = kit.tiny(depths=6)
    batch = kit.batch(tiny, kit.samples(tiny.config, (260, 7, 60)))
    of, anchors, depth = batch["document_ids"][0], batch["anchors"], batch["depth"]
    near = (depth == 0) & (anchors[:, None] >= anchors)
    near &= of[anchors][:, None] == of[anchors]
    return Elements(batch, "auto"), near | (
        (anchors[:, None] == anchors) & (depth[:, None] >= depth)
    )


def test_the_eager_form_is_one_softmax_over_what_is_seen(kit: Any) -> None:
    elements, seen = made(kit)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(seen), heads, 16, generator=gen) for heads in (4, 2, 2))
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*by_head, attn_mask=seen, enable_gqa=True)
    found = elements.attend(0, q, k, v)
    torch.testing.assert_close(found, want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_tiles_are_those_that_something_is_seen_in(kit: Any) -> None:
    """None is missing, none is called wholly visible that is not, few are empty."""
    elements, seen = made(kit)
    mask = elements.mask
    number = torch.arange(len(seen))
    assert torch.equal(mask.mask_mod(number * 0, number, number[:, None], number), seen)
    tiles = -(-len(seen) // 128)
    filled = torch.zeros(tiles * 128, tiles * 128)
    filled[: len(seen), : len(seen)] = seen.float()
    share = filled.view(tiles, 128, tiles, 128).mean((1, 3))
    partly, wholly = torch.zeros_like(share), torch.zeros_like(share)
    for out, counts, columns in (
        (partly, mask.kv_num_blocks, mask.kv_indices),
        (wholly, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None
        assert columns is not None
        for row, n in enumerate(counts[0, 0].tolist()):
            out[row, columns[0, 0, row, :n]] = 1
    assert not (partly * wholly).any()
    assert ((partly + wholly > 0) >= (share > 0)).all()
    assert (share[wholly > 0] == 1).all()
    assert wholly.any()
    assert ((partly > 0) & (share == 0)).sum() < len(share) ** 2 / 5
