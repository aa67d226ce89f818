from __future__ import annotations

import pytest
import torch

from specforge_core.batches.collate import (
    flat_rows,
    num_tokens,
    pack,
    pad,
    token_fields,
    truncate,
)
from specforge_core.types import CaptureSpec, Field, Sample

SPEC = CaptureSpec(
    layers=(0,),
    fields={
        "scale": Field(shape=(2,), dtype="float32"),  # first, and without a token axis
        "input_ids": Field(shape=(None,), dtype="int64"),
        "hidden": Field(shape=(None, 4), dtype="float32"),
    },
)
RAGGED = token_fields(SPEC)


def sample(length: int, seed: int) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    return {
        "scale": torch.rand(2, generator=draw),
        "input_ids": torch.randint(1, 99, (length,), generator=draw),
        "hidden": torch.rand(length, 4, generator=draw),
    }


SAMPLES = [sample(3, 0), sample(1, 1), sample(4, 2)]


def test_the_fields_with_a_token_axis_are_the_specs() -> None:
    assert frozenset({"input_ids", "hidden"}) == RAGGED
    assert [num_tokens(s, SPEC) for s in SAMPLES] == [3, 1, 4]


def test_packed_samples_stand_behind_each_other_in_one_row() -> None:
    batch = pack(SAMPLES, RAGGED)
    assert batch["document_ids"].tolist() == [[1, 1, 1, 2, 3, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    for number, one in enumerate(SAMPLES, 1):
        inside = batch["document_ids"][0] == number
        assert torch.equal(batch["input_ids"][0][inside], one["input_ids"])
        assert torch.equal(batch["hidden"][0][inside], one["hidden"])
        assert torch.equal(batch["scale"][number - 1], one["scale"])
    assert batch["hidden"].shape == (1, 8, 4)


def test_padded_samples_have_a_row_each_and_padding_is_in_no_document() -> None:
    batch = pad(SAMPLES, RAGGED)
    assert batch["document_ids"].tolist() == [[1, 1, 1, 0], [2, 0, 0, 0], [3, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert batch["hidden"].shape == (3, 4, 4)
    for row, one in enumerate(SAMPLES):
        length = len(one["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], one["input_ids"])
        assert torch.equal(batch["hidden"][row, :length], one["hidden"])
        assert not batch["input_ids"][row, length:].any()
        assert not batch["hidden"][row, length:].any()
        assert torch.equal(batch["scale"][row], one["scale"])


def test_rows_without_padding_are_the_same_packed_and_padded() -> None:
    packed, of_packed = flat_rows(pack(SAMPLES, RAGGED), RAGGED)
    padded, of_padded = flat_rows(pad(SAMPLES, RAGGED), RAGGED)
    assert of_packed.tolist() == of_padded.tolist() == [1, 1, 1, 2, 3, 3, 3, 3]
    for name in RAGGED:
        expected = torch.cat([one[name] for one in SAMPLES])
        assert torch.equal(packed[name], expected)
        assert torch.equal(padded[name], expected)


def test_the_first_tokens_are_kept() -> None:
    cut = truncate(SAMPLES[2], RAGGED, 3)
    assert torch.equal(cut["input_ids"], SAMPLES[2]["input_ids"][:3])
    assert torch.equal(cut["hidden"], SAMPLES[2]["hidden"][:3])
    assert torch.equal(cut["scale"], SAMPLES[2]["scale"])
    whole = truncate(SAMPLES[0], RAGGED, 3)
    assert all(torch.equal(whole[name], SAMPLES[0][name]) for name in SAMPLES[0])
    assert len(SAMPLES[2]["input_ids"]) == 4  # what was given is as it was


def test_samples_of_unlike_dtypes_are_joined_as_torch_does() -> None:
    """In the wider one, whichever comes first; nothing is rounded to fit the first sample."""
    narrow, wide = torch.full((2,), 1.0, dtype=torch.bfloat16), torch.full((3,), 1.001)
    for samples in ([{"x": narrow}, {"x": wide}], [{"x": wide}, {"x": narrow}]):
        batch = pack(samples, {"x"})
        assert batch["x"].dtype == torch.float32
        assert float(batch["x"].max()) == float(wide[0])


def test_samples_of_unlike_widths_are_no_batch() -> None:
    samples = [{"x": torch.ones(2, 1)}, {"x": torch.ones(3, 4)}]
    for arrange in (pack, pad):
        with pytest.raises(RuntimeError):
            arrange(samples, {"x"})
