"""Samples that are dropped, skipped or not there yet, and what is told of them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from specforge_core.batches.loader import (
    Closed,
    Share,
    StoredSource,
)
from specforge_core.data.order import epoch_order
from specforge_core.errors import DataError, PluginError
from specforge_core.types import (
    Sample,
)

from .sources import ALONE, Growing, Stored, batches, online, seen, stored, values


def odd(sample: Sample, generator: torch.Generator) -> Sample | None:
    return sample if int(sample["input_ids"][0]) % 2 else None


def test_batches_are_padded_and_their_tokens_counted() -> None:
    micro = next(batches(stored(ALONE), ALONE, size=3))
    assert micro.batch["input_ids"].tolist() == [[0, 0, 0], [1, 1, 0], [2, 2, 2]]
    assert (micro.num_samples, micro.num_tokens, micro.position) == (3, 6, 3)


def test_a_dropped_sample_leaves_its_micro_batch_smaller() -> None:
    found = list(islice(batches(stored(ALONE), ALONE, size=3, transform=odd), 2))
    assert [values(micro) for micro in found] == [[1], [3, 5]]
    assert [(m.num_samples, m.num_tokens, m.position) for m in found] == [(1, 2, 3), (2, 10, 6)]


def test_what_the_adapter_skips_online_leaves_the_micro_batch_smaller_too() -> None:
    order = epoch_order(7, 3, 0)
    micros = batches(online(ALONE, skip=order[1:2]), ALONE, size=3)
    assert [values(micro) for micro in islice(micros, 2)] == [[order[0], order[2]], order[3:6]]


def test_where_all_samples_are_dropped_another_stands_in_and_counts_nothing() -> None:
    found = list(islice(batches(stored(ALONE), ALONE, size=1, transform=odd), 7))
    # the first one has none before it to stand in, so what comes next is looked at
    assert [values(micro) for micro in found] == [[1], [1], [1], [3], [3], [5], [5]]
    assert [micro.num_samples for micro in found] == [0, 1, 0, 1, 0, 1, 0]
    assert [micro.num_tokens for micro in found] == [0, 2, 0, 4, 0, 6, 0]
    assert [micro.position for micro in found] == list(range(1, 8))


def test_ranks_keep_step_when_one_of_them_drops_all_it_has() -> None:
    def late(sample: Sample, generator: torch.Generator) -> Sample | None:
        return sample if int(sample["input_ids"][0]) == 5 else None  # of 8: on rank 1 of 2

    shares = [Share(rank, 2, 3) for rank in range(2)]
    found = [list(islice(batches(stored(s, 8), s, size=2, transform=late), 2)) for s in shares]
    assert [[m.position for m in rank] for rank in found] == [[4, 8], [4, 8]]
    assert [[m.num_samples for m in rank] for rank in found] == [[0, 0], [0, 1]]
    assert all(values(m) == [5] for rank in found for m in rank)


def test_a_transform_that_takes_fields_out_is_given_them_again() -> None:
    def takes(sample: Sample, generator: torch.Generator) -> Sample | None:
        ids = sample.pop("input_ids")
        return {**sample, "input_ids": ids} if int(ids[0]) == 5 else None

    # the first batch looks ahead for a sample to stand in, which its own batch asks for again
    found = list(islice(batches(stored(ALONE, 8), ALONE, size=2, transform=takes), 4))
    assert sum(micro.num_samples for micro in found) == 1


@pytest.mark.parametrize("growing", [False, True])
def test_an_epoch_without_a_sample_to_train_on_is_an_error(growing: bool) -> None:
    reader = Growing(7) if growing else Stored(7)
    source = StoredSource(reader, ALONE)
    micros = batches(source, ALONE, size=1, transform=lambda sample, generator: None)
    with pytest.raises(DataError, match="none of 7 samples can be trained on"):
        next(micros)


def test_what_a_plugin_raises_or_returns_names_the_hook() -> None:
    def broken(sample: Sample, generator: torch.Generator) -> Sample:
        raise KeyError("label")

    with pytest.raises(PluginError, match="specforge_transform: KeyError: 'label'"):
        next(batches(stored(ALONE), ALONE, transform=broken))
    with pytest.raises(PluginError, match="specforge_collate: returned list, expected a dict"):
        next(batches(stored(ALONE), ALONE, collate=list))  # type: ignore[arg-type]


def test_a_growing_capture_is_waited_for_and_gives_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specforge_core.batches.stored.POLL_SECONDS", 0.0)
    grown = seen(batches(StoredSource(Growing(7), ALONE), ALONE), 7)
    assert grown == seen(batches(stored(ALONE), ALONE), 7)


def test_a_growing_capture_that_ends_empty_is_an_error() -> None:
    with pytest.raises(DataError, match="finished without a sample"):
        next(batches(StoredSource(Growing(0), ALONE), ALONE))


def test_nobody_waits_for_a_capture_after_its_source_is_closed() -> None:
    class Dead(Stored):
        def refresh(self) -> bool:
            return False

    source = StoredSource(Dead(0), ALONE)
    source.close()
    with pytest.raises(Closed):
        next(source.samples(0))
