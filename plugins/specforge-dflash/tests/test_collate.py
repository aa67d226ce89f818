"""Blocks of a batch: what each slot is given, asked and may see, and which of them are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import start_places
from specforge_dflash.collate import DFlashCollate, train_slots

from specforge_core.errors import DataError
from specforge_core.types import Batch, Sample

MASK = 40
LAYOUTS = (("same_position", 1), ("next_token", 0))


def blocks(batch: Batch) -> list[tuple[int, ...]]:
    """(row, block, anchor, document's start) of the blocks that train something."""
    found = batch["valid"].any(2).nonzero().tolist()
    return [(r, i, int(batch["anchors"][r, i]), int(batch["starts"][r, i])) for r, i in found]


@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize(("layout", "first"), LAYOUTS)
def test_slots_are_asked_for_the_tokens_after_their_anchor(
    kit: Any, batches: str, layout: str, first: int
) -> None:
    samples = kit.samples((19, 11, 4, 6))
    config = kit.config(label_layout=layout, batches=batches)
    batch = kit.batch(config, samples)
    shown = []
    for row, block, anchor, start in blocks(batch):
        number = row if batches == "padded" else [0, 19, 30, 34].index(start)
        assert start == (0 if batches == "padded" else [0, 19, 30, 34][number])
        ids, mask = (samples[number][name] for name in ("input_ids", "loss_mask"))
        own = anchor - start
        shown.append((number, own))
        assert batch["block_ids"][row, block].tolist() == [int(ids[own]), *[MASK] * 3]
        for slot in range(4):
            place = own + slot + 1 - first
            valid = slot >= first and place < len(ids) and bool(mask[place])
            assert bool(batch["valid"][row, block, slot]) == valid
            assert int(batch["labels"][row, block, slot]) == (int(ids[place]) if valid else 0)
    wanted = [(n, a) for n, s in enumerate(samples) for a in start_places(s["loss_mask"]).tolist()]
    assert shown == wanted
    assert torch.equal(batch["rows"], batch["valid"].flatten().nonzero().squeeze(1))
    assert batch["anchors"].diff(dim=1).ge(0).all() or batches == "padded"


def test_a_label_is_never_the_next_documents_token(kit: Any) -> None:
    samples = kit.samples((7, 9))
    for sample in samples:
        sample["loss_mask"].fill_(1)
    batch = kit.batch(kit.config(), samples)
    last = batch["valid"][0, 5]  # the block at token 5 of 7: one token is left
    assert last.tolist() == [False, True, False, False]


def test_no_block_is_wider_than_needed_and_padding_sees_nothing(kit: Any) -> None:
    config = kit.config(batches="padded")
    batch = kit.batch(config, kit.samples((40, 5)))
    counts = batch["valid"].any(2).sum(1).tolist()
    assert batch["anchors"].shape[1] == max(counts)
    beyond = ~batch["valid"].any(2)
    assert beyond.any()
    assert not batch["anchors"][beyond].any()
    assert not batch["starts"][beyond].any()


def test_sizes_are_whatever_the_samples_come_to(kit: Any) -> None:
    batch = kit.batch(kit.config(num_anchors=3), kit.samples((19, 11)))
    assert batch["hidden_states"].shape == (1, 30, 48)
    assert batch["anchors"].shape == (1, 6)
    assert batch["document_ids"].tolist() == [[1] * 19 + [2] * 11]
    assert batch["position_ids"].tolist() == [[*range(19), *range(11)]]


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_a_sample_draws_the_same_in_any_company(kit: Any, batches: str) -> None:
    """Whatever batch, place in it or rank a sample comes to, its blocks are the same."""
    config = kit.config(num_anchors=4, batches=batches)
    samples = kit.samples((30, 25, 40))
    spec = capture_spec((1, 5), 24)
    collate = DFlashCollate(config, spec, MASK)
    drawn = [
        {**s, "anchors": start_places(s["loss_mask"])[torch.tensor([1, 3, 6])]} for s in samples
    ]

    def of(batch: Batch, document: int) -> list[list[int]]:
        row = document if batches == "padded" else 0
        begin = 0 if batches == "padded" else int((batch["document_ids"][0] <= document).sum())
        mine = batch["starts"][row] == begin
        own = (batch["anchors"] - batch["starts"])[row, mine]
        return [own.tolist(), *batch["labels"][row, mine].tolist()]

    whole = collate(drawn)
    for number, sample in enumerate(drawn):
        assert of(whole, number) == of(collate([sample]), 0)
    swapped = collate([drawn[2], drawn[0]])
    assert of(swapped, 0) == of(whole, 2)
    assert of(swapped, 1) == of(whole, 0)


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_samples_without_an_anchor_make_one_block_that_trains_nothing(
    kit: Any, batches: str
) -> None:
    none = torch.empty(0, dtype=torch.int64)
    samples: list[Sample] = [{**s, "anchors": none} for s in kit.samples((5, 8))]
    config = kit.config(batches=batches)
    batch = DFlashCollate(config, capture_spec((1, 5), 24), MASK)(samples)
    assert batch["anchors"].shape == (1 if batches == "packed" else 2, 1)
    assert not batch["valid"].any()
    assert not len(batch["rows"])


def test_fewer_slots_can_be_trained(kit: Any) -> None:
    batch = kit.batch(kit.config(), kit.samples())
    fewer = batch["valid"].clone()
    fewer[..., 2:] = False
    cut = train_slots(batch, fewer)
    slots = cut["rows"] % 4
    assert set(slots.tolist()) == {1}
    assert len(cut["rows"]) == int(batch["valid"][..., 1].sum())
    assert torch.equal(cut["labels"], batch["labels"])


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_the_mask_token_in_the_data_is_an_error(kit: Any, batches: str) -> None:
    samples = kit.samples()
    samples[1]["input_ids"][2] = MASK
    with pytest.raises(DataError, match=r"training data contains token 40.*mask_token_id=null"):
        kit.batch(kit.config(batches=batches), samples)


def test_padding_is_not_taken_for_the_mask_token(kit: Any) -> None:
    """Padding is token 0, which may be the mask token."""
    spec, config = capture_spec((1, 5), 24), kit.config(batches="padded")
    samples = [{**s, "anchors": start_places(s["loss_mask"])} for s in kit.samples((9, 5))]
    assert DFlashCollate(config, spec, 0)(samples)["block_ids"][1, 0].tolist()[1:] == [0, 0, 0]
