from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.shardfile import TABLE
from specforge_core.capture.store import ShardReader, read_token_counts
from specforge_core.capture.writer import ShardWriter
from specforge_core.errors import CaptureError
from specforge_core.types import Sample

from ..captured import identity

IDENTITY = identity(
    layers=(1, 3),
    fields={
        "input_ids": ((None,), "int64"),
        "hidden": ((None, 4), "bfloat16"),
        "label": ((2,), "float32"),
    },
)


def sample(index: int) -> Sample:
    draw = torch.Generator().manual_seed(index)
    length = 3 + index % 5
    return {
        "input_ids": torch.randint(0, 100, (length,), generator=draw),
        "hidden": torch.randn(length, 4, generator=draw).bfloat16(),
        "label": torch.randn(2, generator=draw),
    }


def equal(a: Sample, b: Sample) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A finished capture of prompts 100 to 119 in several shards."""
    path = tmp_path / "capture"
    with ShardWriter(path, IDENTITY, 20) as writer:
        writer.begin(torch.arange(100))
        for index in range(100, 120):
            writer.add(index, sample(index))
        writer.close()
    return path


def open_reader(directory: Path) -> ShardReader:
    return ShardReader(directory, CaptureManifest.read(directory))


def test_samples_come_back_bit_for_bit_in_the_order_they_were_stored(directory: Path):
    reader = open_reader(directory)
    assert len(reader.manifest.shards) > 3
    assert len(reader) == 20
    assert [reader.prompt_index(i) for i in range(20)] == list(range(100, 120))
    for i in (*range(20), 3, 17, 0):
        assert equal(reader[i], sample(100 + i))


def test_a_reader_tells_how_many_tokens_are_supervised(directory: Path, tmp_path: Path) -> None:
    """From the masks alone, and of samples without one that all are."""
    assert open_reader(directory).num_supervised(6) == len(sample(106)["input_ids"])
    fields = {"input_ids": ((None,), "int64"), "loss_mask": ((None,), "uint8")}
    masks = [torch.arange(n) % 3 == 0 for n in (5, 1, 9, 4, 30, 2)]
    with ShardWriter(tmp_path / "masked", identity(layers=(1, 3), fields=fields), 12) as writer:
        for index, mask in enumerate(masks):
            writer.add(index, {"input_ids": torch.arange(len(mask)), "loss_mask": mask.byte()})
        writer.close()
    reader = open_reader(tmp_path / "masked")
    assert len(reader.manifest.shards) > 1
    found = [reader.num_supervised(i) for i in (5, 0, 3, 1, 2, 4)]
    assert found == [int(masks[i].sum()) for i in (5, 0, 3, 1, 2, 4)]
    with pytest.raises(IndexError):
        reader.num_supervised(6)


def test_shards_are_plain_safetensors_files(directory: Path):
    with safe_open(directory / "shard-00001.safetensors", framework="pt") as file:
        assert set(file.keys()) == {*IDENTITY.fields, *TABLE}
        offsets, index = file.get_tensor("_offsets"), file.get_tensor("_index")
        expected = sample(int(index[1]))["hidden"]
        assert torch.equal(file.get_tensor("hidden")[offsets[1] : offsets[2]], expected)


def test_an_index_out_of_range_is_an_index_error(directory: Path):
    reader = open_reader(directory)
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match=f"sample {wrong} of 20"):
            reader[wrong]


def test_changing_a_sample_changes_neither_the_file_nor_later_reads(directory: Path):
    reader = open_reader(directory)
    reader[4]["hidden"].zero_()
    assert equal(reader[4], sample(104))


def test_few_shards_are_held_open(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specforge_core.capture.store.MAX_OPEN", 1)
    reader = open_reader(directory)
    assert len(reader.manifest.shards) > 1
    for index in [*range(len(reader)), 0]:
        reader[index]
    assert list(reader._open) == [0]


def test_a_growing_capture_is_seen_by_refresh(tmp_path: Path):
    with ShardWriter(tmp_path, IDENTITY, 8) as writer:
        writer.begin(torch.ones(100, dtype=torch.int64))
        reader = open_reader(tmp_path)
        assert len(reader) == 0
        assert reader.refresh() is False
        seen = []
        for index in range(6):
            writer.add(index, sample(index))
            assert reader.refresh() is False
            seen.append(len(reader))
            assert all(equal(reader[i], sample(i)) for i in range(len(reader)))
        writer.close()
    assert seen == sorted(seen)
    assert 0 < seen[-1] < 6  # some were seen before the end
    assert reader.refresh() is True
    assert len(reader) == 6


def test_a_capture_replaced_under_a_reader_is_an_error(directory: Path):
    reader = open_reader(directory)
    manifest = reader.manifest
    manifest.model_copy(update={"shards": manifest.shards[1:]}).write(directory)
    with pytest.raises(CaptureError, match="was replaced while it was read"):
        reader.refresh()


def test_a_truncated_shard_is_an_error(directory: Path):
    path = directory / "shard-00002.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CaptureError, match=rf"shard-00002.*{size - 1} bytes: it is truncated"):
        open_reader(directory)


def test_a_shard_truncated_after_the_reader_was_opened_is_an_error(directory: Path):
    reader = open_reader(directory)
    assert equal(reader[0], sample(100))
    os.truncate(directory / "shard-00000.safetensors", 700)
    with pytest.raises(CaptureError, match=r"it is truncated|is not as written"):
        [reader[i] for i in range(reader.manifest.shards[0].num_samples)]


def test_a_missing_shard_is_an_error(directory: Path):
    (directory / "shard-00001.safetensors").unlink()
    with pytest.raises(CaptureError, match=r"shard-00001\.safetensors is missing"):
        open_reader(directory)


def test_a_shard_with_other_fields_is_an_error(directory: Path):
    manifest = CaptureManifest.read(directory)
    identity = manifest.identity.model_copy(update={"fields": {"other": ((None,), "int64")}})
    with pytest.raises(CaptureError, match="lacks other, which the manifest promises"):
        ShardReader(directory, manifest.model_copy(update={"identity": identity}))[0]


def test_a_directory_without_a_manifest_is_an_error(tmp_path: Path):
    with pytest.raises(CaptureError, match=r"has no manifest\.json.*specforge capture -c"):
        CaptureManifest.read(tmp_path)


def test_token_counts_are_kept_beside_the_shards(directory: Path):
    manifest = CaptureManifest.read(directory)
    counts = read_token_counts(directory, manifest)
    assert counts is not None
    assert torch.equal(counts, torch.arange(100))
    assert read_token_counts(directory, manifest.model_copy(update={"token_counts": None})) is None
    (directory / "token_counts.safetensors").unlink()
    with pytest.raises(CaptureError, match=r"token_counts\.safetensors is missing or damaged"):
        read_token_counts(directory, manifest)
