from __future__ import annotations

import random

from specforge_core.target.batching import group_by_length


def test_every_sequence_is_in_one_batch_and_no_batch_is_over_the_budget():
    lengths = [random.Random(0).randint(1, 300) for _ in range(200)]
    batches = group_by_length(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in b) * len(b) <= 1000 for b in batches)


def test_padding_is_a_small_part_of_what_runs():
    lengths = [random.Random(1).randint(1, 300) for _ in range(200)]
    batches = group_by_length(lengths, 1000)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.9


def test_a_sequence_longer_than_the_budget_runs_alone():
    assert group_by_length([5, 50, 4], 10) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order():
    assert group_by_length([3, 3, 3, 3], 6) == [[0, 1], [2, 3]]


def test_no_sequences_make_no_batches():
    assert group_by_length([], 10) == []
