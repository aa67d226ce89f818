"""The draft vocabulary: chosen, checked, and given by the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from specforge_eagle3 import build_draft, draft_map
from specforge_eagle3.config import draft_shape
from specforge_eagle3.vocab import (
    check_map,
    frequent_tokens,
    members,
    offsets,
    read_map,
    target_tokens,
)

from specforge_core.errors import CheckpointError, ConfigError


def test_the_most_frequent_tokens_ascending_ties_by_low_id() -> None:
    counts = torch.tensor([0, 5, 2, 9, 2, 0, 2])
    assert frequent_tokens(counts, 3).tolist() == [1, 2, 3]
    assert frequent_tokens(counts, 4).tolist() == [1, 2, 3, 4]
    assert frequent_tokens(counts, 6).tolist() == [0, 1, 2, 3, 4, 6]  # filled up with unused ones


def test_offsets_and_membership() -> None:
    tokens = torch.tensor([1, 2, 3, 6])
    assert offsets(tokens).tolist() == [1, 1, 1, 3]
    assert target_tokens(offsets(tokens)).tolist() == [1, 2, 3, 6]
    assert members(offsets(tokens), 8).int().tolist() == [0, 1, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("parts", [("d2t",), ("t2d",), ("d2t", "t2d")])
def test_a_users_map_is_read_from_either_part(tmp_path: Path, parts: tuple[str, ...]) -> None:
    d2t = offsets(torch.tensor([1, 2, 3, 6]))
    tensors = {"d2t": d2t, "t2d": members(d2t, 8)}
    save_file({n: tensors[n] for n in parts}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(read_map(path, 4, 8), d2t)


def test_maps_that_are_none() -> None:
    d2t = offsets(torch.tensor([1, 2, 3, 6]))
    wrong = members(d2t, 8)
    wrong[0] = True
    with pytest.raises(CheckpointError, match="d2t and t2d disagree on 1 tokens"):
        check_map({"d2t": d2t, "t2d": wrong}, 4, 8, "m")
    with pytest.raises(CheckpointError, match=r"t2d has shape \[7\], and the target has 8"):
        check_map({"t2d": torch.ones(7)}, 4, 8, "m")
    with pytest.raises(CheckpointError, match=r"maps 4 draft tokens, and .* is 5"):
        check_map({"d2t": d2t}, 5, 8, "m")
    with pytest.raises(CheckpointError, match="Were absolute ids stored"):
        check_map({"d2t": torch.tensor([1, 2, 3, 6])}, 4, 8, "m")
    with pytest.raises(CheckpointError, match="not increasing"):
        check_map({"d2t": torch.tensor([3, 0, 0, 0])}, 4, 8, "m")
    with pytest.raises(CheckpointError, match="has neither d2t nor t2d"):
        check_map({}, 4, 8, "m")


def test_a_map_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("no")
    for path in (tmp_path / "none", tmp_path / "x.safetensors"):
        with pytest.raises(ConfigError, match=r"vocab_map .* cannot be read"):
            read_map(path, 4, 8)


def test_which_map_a_new_draft_gets(kit: Any, tmp_path: Path) -> None:
    target = kit.target()
    counts = torch.arange(29)
    config = kit.config()
    frequent = draft_map(config, draft_shape(config, target), counts)
    assert target_tokens(frequent).tolist() == list(range(12, 29))

    file = tmp_path / "map.safetensors"
    save_file({"d2t": torch.zeros(17, dtype=torch.int64)}, file)
    config = kit.config(vocab_map=str(file))
    assert not draft_map(config, draft_shape(config, target), counts).any()

    config = kit.config(draft_vocab_size="full")
    assert not draft_map(config, draft_shape(config, target), None).any()

    config = kit.config()
    with pytest.raises(ConfigError, match="this capture is still growing"):
        draft_map(config, draft_shape(config, target), None)


def test_a_new_draft_begins_with_the_targets_rows_and_one_to_be_loaded_with_numbers(
    kit: Any,
) -> None:
    config = kit.config()
    shape = draft_shape(config, kit.target())
    head = torch.randn(29, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(3, 20)
    new = build_draft(config, shape, head, lambda: head, offsets(tokens)).model.state_dict()
    empty = build_draft(config, shape, head, lambda: head, None).model.state_dict()
    assert torch.equal(new.pop("lm_head.weight"), head[tokens])
    assert bool(empty.pop("lm_head.weight").isfinite().all())
    drawn = [name for name in new if name.endswith(".weight")]
    assert drawn
    assert all(torch.equal(new[name], empty[name]) for name in drawn)
