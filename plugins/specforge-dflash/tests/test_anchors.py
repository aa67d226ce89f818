"""Where blocks start: drawn per sample, and by nothing but its own generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash.adapter import capture_spec
from specforge_dflash.anchors import DFlashTransform, start_places
from torch import Tensor

from specforge_core.draws import draws_of
from specforge_core.types import Counting, Sample

SPEC = capture_spec((1, 5), 24)


def draw(sample: Sample, count: int, seed: int = 0, max_length: int = 1000) -> Sample | None:
    generator = torch.Generator().manual_seed(seed)
    return DFlashTransform(SPEC, max_length, count)(sample, generator)


def anchors(sample: Sample, count: int, seed: int = 0) -> list[int]:
    drawn = draw(sample, count, seed)
    assert drawn is not None
    return drawn["anchors"].tolist()


def starts(mask: Tensor) -> list[int]:
    return [a for a in range(len(mask) - 1) if mask[a] and mask[a + 1]]


def test_every_place_is_taken_when_there_is_room(kit: Any) -> None:
    for sample in kit.samples((19, 11, 60)):
        assert anchors(sample, 512) == starts(sample["loss_mask"])


def test_a_transform_tells_about_how_many_anchors_it_draws(kit: Any) -> None:
    """By which ranks are balanced: the end of each answer alone is not known beforehand."""
    for count in (4, 512):
        transform = DFlashTransform(SPEC, 1000, count)
        assert isinstance(transform, Counting)
        for sample in kit.samples((19, 11, 60)):
            mask = sample["loss_mask"].int()
            answers = int((mask.diff(append=mask.new_zeros(1)) < 0).sum())
            told = transform.rows(len(mask), int(mask.sum()))
            assert 0 <= told - len(anchors(sample, count)) <= answers


def test_anchors_are_distinct_ascending_and_allowed(kit: Any) -> None:
    (sample,) = kit.samples((60,))
    allowed = starts(sample["loss_mask"])
    assert len(allowed) > 12
    for seed in range(20):
        found = anchors(sample, 12, seed)
        assert found == sorted(set(found))
        assert len(found) == 12
        assert set(found) <= set(allowed)


def test_anchors_are_drawn_uniformly() -> None:
    sample = {
        "input_ids": torch.ones(11, dtype=torch.int64),
        "loss_mask": torch.ones(11, dtype=torch.uint8),
        "hidden_states": torch.zeros(11, 48),
    }
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[torch.tensor(anchors(sample, 3, seed))] += 1
    # 600 each, standard deviation 20.5
    assert float((counts - 600).abs().max()) < 90


def test_the_draw_depends_on_the_generator_alone(kit: Any) -> None:
    (sample,) = kit.samples((60,))
    torch.manual_seed(1)
    first = anchors(sample, 5, 1)
    torch.manual_seed(2)
    assert anchors(sample, 5, 1) == first
    assert anchors(sample, 5, 2) != first


def test_a_sample_is_cut_before_the_draw(kit: Any) -> None:
    sample: Sample = {
        "input_ids": torch.arange(5),
        "loss_mask": torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8),
        "hidden_states": torch.zeros(5, 48),
    }
    cut = draw(sample, 512, max_length=4)
    assert cut is not None
    assert {name: len(tensor) for name, tensor in cut.items()} == {
        "input_ids": 4, "loss_mask": 4, "hidden_states": 4, "anchors": 1
    }  # fmt: skip
    assert cut["anchors"].tolist() == [2]
    assert draw(sample, 512, max_length=3) is None


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 1], [0, 0, 1], [1]])
def test_a_sample_without_a_place_is_dropped(mask: list[int]) -> None:
    assert not len(start_places(torch.tensor(mask)))
    sample = {
        "input_ids": torch.arange(len(mask)),
        "loss_mask": torch.tensor(mask, dtype=torch.uint8),
        "hidden_states": torch.zeros(len(mask), 48),
    }
    assert draw(sample, 512) is None


def test_epochs_draw_anew_and_again_the_same(kit: Any) -> None:
    (sample,) = kit.samples((60,))
    transform = DFlashTransform(SPEC, 1000, 5)

    def drawn(seed: int, epoch: int, number: int) -> list[int]:
        found = transform(sample, draws_of(seed, epoch, number))
        assert found is not None
        return found["anchors"].tolist()

    assert drawn(0, 1, 3) == drawn(0, 1, 3)
    others = [drawn(1, 1, 3), drawn(0, 2, 3), drawn(0, 1, 4)]
    assert drawn(0, 1, 3) not in others
