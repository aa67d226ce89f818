from __future__ import annotations

import random
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest

from specforge_core.target.batching import fill_in_order, group_by_length, least_tokens, rope_turn


def test_every_sequence_is_in_one_batch_and_no_batch_is_over_the_budget():
    lengths = [random.Random(0).randint(1, 300) for _ in range(200)]
    batches = group_by_length(lengths, 1000, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in b) * len(b) <= 1000 for b in batches)


def padded(batches: list[list[int]], lengths: list[int], least: int) -> int:
    return sum(max(max(lengths[i] for i in b) * len(b), least) for b in batches)


@pytest.mark.parametrize("least", [0, 100, 250, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_cut_pads_less(least: int, seed: int):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 300) for _ in range(9)]
    order = sorted(range(9), key=lambda i: -lengths[i])
    every = []
    for count in range(9):
        for cuts in combinations(range(1, 9), count):
            edges = [0, *cuts, 9]
            batches = [order[a:b] for a, b in pairwise(edges)]
            if all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 900 for b in batches):
                every.append((padded(batches, lengths, least), len(batches)))
    found = group_by_length(lengths, 900, least)
    assert padded(found, lengths, least) == min(every)[0]


def test_what_would_save_no_time_is_not_cut():
    lengths = [100, 90, 20, 10]
    lengths = [100, 90, 20, 10]
    assert group_by_length(lengths, 1000, 400) == [[0, 1, 2, 3]]
    assert group_by_length(lengths, 1000, 50) == [[0], [1], [2, 3]]


def test_a_sequence_longer_than_the_budget_runs_alone():
    assert group_by_length([5, 50, 4], 10, 5) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order():
    assert group_by_length([3, 3, 3, 3], 6, 0) == [[0, 1], [2, 3]]


def test_no_sequences_make_no_batches():
    assert group_by_length([], 10, 0) == []


def test_a_small_model_on_a_gpu_waits_for_its_launches():
    """What fits a launch: some 1,300 tokens of 8 G parameters, many more of 135 M."""
    assert 1200 < least_tokens("cuda", 36, 8_200_000_000) < 1500
    assert least_tokens("cuda", 30, 135_000_000) > 50_000
    assert least_tokens("cpu", 30, 135_000_000) < 100


def test_rows_without_padding_are_few_and_even():
    lengths = [random.Random(0).randint(1, 300) for _ in range(200)]
    batches = fill_in_order(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(sizes) <= 1000
    assert len(sizes) <= sum(lengths) / 1000 * 1.2
    assert fill_in_order([4, 4, 1, 4, 4], 16) == [[0, 1], [3, 4, 2]]  # not 16 and 1
    assert fill_in_order([5, 50, 4, 1], 10) == [[1], [0, 2, 3]]
    assert fill_in_order([], 10) == []


@pytest.mark.parametrize(
    ("rope", "turn"),
    [
        (None, 0),
        ({"rope_type": "llama3", "original_max_position_embeddings": 64}, 0),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "dynamic", "factor": 4.0}, 96),
        (
            {
                "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
                "sliding_attention": {"rope_type": "default"},
            },
            64,
        ),
    ],
)
def test_where_a_long_rope_turns_is_in_any_layers_parameters(
    rope: dict[str, object] | None, turn: int
):
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=96)
    config.get_text_config = lambda: config
    assert rope_turn(config) == turn
