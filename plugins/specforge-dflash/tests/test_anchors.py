"""Where blocks start, and what they are asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash.anchors import Blocks, draw_blocks
from torch import Tensor

from specforge_core.errors import DataError

MASK = 40


def draw(config: Any, batch: dict[str, Tensor], seed: int = 0) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return draw_blocks(config, MASK, batch["input_ids"], batch["loss_mask"], generator)


def starts(loss_mask: Tensor) -> list[list[int]]:
    return [[a for a in range(len(row) - 1) if row[a] and row[a + 1]] for row in loss_mask.tolist()]


def test_every_candidate_is_taken_when_there_is_room(kit: Any) -> None:
    batch = kit.batch()
    blocks = draw(kit.config(num_anchors=512), batch)
    found = [a[k].tolist() for a, k in zip(blocks.anchors, blocks.keep, strict=True)]
    assert found == starts(batch["loss_mask"])
    assert blocks.keep.shape[1] == max(len(row) for row in found)  # no wider than needed


def test_anchors_are_distinct_ascending_and_padded_at_the_end(kit: Any) -> None:
    batch = kit.batch((60, 9, 40))
    for seed in range(20):
        blocks = draw(kit.config(num_anchors=12), batch, seed)
        assert blocks.anchors.shape == (3, 12)
        for anchors, keep, allowed in zip(
            blocks.anchors, blocks.keep, starts(batch["loss_mask"]), strict=True
        ):
            kept = anchors[keep].tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= set(allowed)
            assert len(kept) == min(12, len(allowed))
            assert keep.tolist() == [True] * len(kept) + [False] * (12 - len(kept))


def test_anchors_are_drawn_uniformly(kit: Any) -> None:
    batch = {
        "input_ids": torch.ones(1, 11, dtype=torch.int64),
        "loss_mask": torch.ones(1, 11, dtype=torch.int64),
    }
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    config = kit.config(num_anchors=3)
    for _ in range(2000):
        blocks = draw_blocks(config, MASK, batch["input_ids"], batch["loss_mask"], generator)
        counts[blocks.anchors[0]] += 1
    # 600 each, standard deviation 20.5
    assert float((counts - 600).abs().max()) < 90


def test_the_draw_depends_on_the_generator_alone(kit: Any) -> None:
    batch, config = kit.batch((60,)), kit.config(num_anchors=5)
    assert torch.equal(draw(config, batch, 1).anchors, draw(config, batch, 1).anchors)
    assert not torch.equal(draw(config, batch, 1).anchors, draw(config, batch, 2).anchors)


@pytest.mark.parametrize(("layout", "first"), [("same_position", 1), ("next_token", 0)])
def test_labels_are_the_tokens_after_the_anchor(kit: Any, layout: str, first: int) -> None:
    batch = kit.batch()
    ids, mask = batch["input_ids"], batch["loss_mask"]
    blocks = draw(kit.config(label_layout=layout), batch)
    assert blocks.labels.shape[2] == 4 - first
    for row in range(len(ids)):
        for i, anchor in enumerate(blocks.anchors[row].tolist()):
            if not blocks.keep[row, i]:
                assert not blocks.valid[row, i].any()
                continue
            assert blocks.input_ids[row, i].tolist() == [int(ids[row, anchor]), *[MASK] * 3]
            for slot in range(first, 4):
                place = anchor + slot + (0 if layout == "same_position" else 1)
                valid = place < ids.shape[1] and bool(mask[row, place])
                assert bool(blocks.valid[row, i, slot - first]) == valid
                if valid:
                    assert int(blocks.labels[row, i, slot - first]) == int(ids[row, place])


def test_a_batch_without_a_place_to_start_has_one_padded_block(kit: Any) -> None:
    batch = kit.batch()
    batch["loss_mask"].zero_()
    blocks = draw(kit.config(), batch)
    assert blocks.keep.shape == (2, 1)
    assert not blocks.keep.any()
    assert not blocks.valid.any()


def test_the_mask_token_in_the_data_is_an_error(kit: Any) -> None:
    batch = kit.batch()
    batch["input_ids"][1, 2] = MASK
    with pytest.raises(DataError, match=r"training data contains token 40.*mask_token_id="):
        draw(kit.config(), batch)
