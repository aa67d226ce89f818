"""Confidences: their error, and the temperatures that make it least."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specforge_dspark.confidence import BINS, append, calibrate, calibration_error, read

from specforge_core.errors import DataError


def test_the_error_is_the_weighted_difference_of_each_bin() -> None:
    draw = torch.Generator().manual_seed(0)
    probs = torch.rand(500, generator=draw, dtype=torch.float64)
    happened = (torch.rand(500, generator=draw) < 0.5).double()
    total = 0.0
    for bin in range(BINS):
        inside = (probs >= bin / BINS) & (probs < (bin + 1) / BINS)
        if inside.any():
            apart = probs[inside].mean() - happened[inside].mean()
            total += float(apart.abs()) * int(inside.sum()) / 500
    assert calibration_error(probs, happened) == pytest.approx(total)
    assert calibration_error(torch.ones(4, dtype=torch.float64), torch.ones(4)) == 0


def test_temperatures_of_a_known_kind_are_found() -> None:
    """Confidences that are three times too sure at the first place, half as sure at the second."""
    draw = torch.Generator().manual_seed(1)
    true = torch.randn(20000, 2, generator=draw, dtype=torch.float64) * 1.5
    kept = torch.rand(20000, 2, generator=draw, dtype=torch.float64) < true.sigmoid()
    found = calibrate(true * torch.tensor([3.0, 0.5]), kept.long().cumprod(1).sum(1))
    assert found.temperatures == pytest.approx([3.0, 0.5], rel=0.2)
    assert max(found.ece_after) < 0.02 < min(found.ece_before)
    assert found.num_samples == 20000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[1, 2]",
        '{"logits": [1.0], "accepted": 0}',
        '{"logits": [1.0, NaN], "accepted": 0}',
        '{"logits": [1.0, 2.0]}',
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="calibration="):
        read(path, 2)
    with pytest.raises(DataError, match="calibration="):
        read(tmp_path / "none", 2)


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record_confidence="):
        append(tmp_path / "none" / "record", [1.0], 0)
