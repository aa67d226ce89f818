"""What is drawn: as many as the formula says, nested, and each row as likely as another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_eagle3.adapter import capture_spec
from specforge_peagle import specforge_transform
from specforge_peagle.elements import draw_depths
from torch import Tensor


def labels_of(length: int = 60) -> Tensor:
    labels = torch.ones(length, dtype=torch.bool)
    labels[:10] = False
    labels[30:33] = False
    return labels


def test_each_depth_keeps_what_the_formula_says(kit: Any) -> None:
    config = kit.config(depths=6, keep_ratio=0.8, keep_least=0.45)
    labels, total = labels_of(), int(labels_of().sum())
    depths = draw_depths(config, labels, torch.Generator().manual_seed(0))["depths"]
    before = torch.ones(60, dtype=torch.bool)
    for d in range(1, 6):
        kept = depths >= d
        possible = torch.zeros(60, dtype=torch.bool)
        possible[: 59 - d] = labels[1 + d :]
        possible &= before
        assert not (kept & ~possible).any()
        count = int((total - d) * max(0.8**d, 0.45))
        assert int(kept.sum()) == min(count, int(possible.sum()))
        before = kept


def test_all_are_kept_at_a_ratio_of_1(kit: Any) -> None:
    labels = labels_of()
    drawn = draw_depths(kit.config(keep_ratio=1), labels, torch.Generator())
    for row in range(60):
        runs = [u < 60 and bool(labels[u]) for u in range(row + 2, row + 5)]
        assert int(drawn["depths"][row]) == [*runs, False].index(False)
    assert drawn["whole"].all()


def test_rows_are_kept_alike_and_whole_ones_are_not_chosen_by_length(kit: Any) -> None:
    config = kit.config(depths=4, keep_ratio=0.7, keep_least=0.2)
    labels, generator, rounds = torch.ones(24, dtype=torch.bool), torch.Generator(), 400
    deep, fair = torch.zeros(24), torch.zeros(24)
    for _ in range(rounds):
        drawn = draw_depths(config, labels, generator)
        deep += drawn["depths"] == 3
        fair += drawn["whole"]
    inside = deep[:20]  # the last rows cannot go that deep
    chance = int((24 - 3) * 0.7**3) / 20
    spread = (rounds * chance * (1 - chance)) ** 0.5
    assert inside.sum() / (20 * rounds) == pytest.approx(chance, rel=0.05)
    assert (inside - rounds * chance).abs().max() < 4.5 * spread
    # the last rows end sooner, and count no more often for that
    share = float(fair.mean()) / rounds
    assert (fair - rounds * share).abs().max() < 4.5 * (rounds * share * (1 - share)) ** 0.5


def test_a_sample_is_cut_and_drawn_by_its_generator(kit: Any) -> None:
    config = kit.config()
    (sample,) = kit.samples(config, (30,))
    raw = {name: value for name, value in sample.items() if name not in ("depths", "whole")}
    transform = specforge_transform(config, capture_spec((1, 3, 4), 24), 20)
    one, same, other = (transform(raw, torch.Generator().manual_seed(i)) for i in (1, 1, 2))
    assert one is not None
    assert same is not None
    assert other is not None
    assert {len(value) for value in one.values()} == {20}
    assert torch.equal(one["depths"], same["depths"])
    assert not torch.equal(one["depths"], other["depths"])
    silent = {**raw, "loss_mask": raw["loss_mask"] * 0}
    assert transform(silent, torch.Generator()) is None
