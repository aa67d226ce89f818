"""Whatever byte or number of a shard is changed, the sample it belongs to is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.shardfile import CHECKSUMS, INDEX, OFFSETS, SKIPPED
from specforge_core.capture.store import ShardReader, read_token_counts
from specforge_core.capture.verify import verify_directory
from specforge_core.capture.writer import ShardWriter
from specforge_core.errors import CaptureError
from specforge_core.tensorfile import OpenFile, read_header

from ..captured import identity

IDENTITY = identity(
    fields={
        "input_ids": ((None,), "int64"),
        "hidden": ((None, 4), "bfloat16"),
        "label": ((2,), "float32"),
    },
)
FIRST = "shard-00000.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A finished capture of 8 prompts, one of them skipped, in two shards."""
    with ShardWriter(tmp_path, IDENTITY, 20, prompts="p", num_prompts=8) as writer:
        writer.begin(torch.ones(100, dtype=torch.int64))
        writer.skip(0)
        for index in range(1, 8):
            draw = torch.Generator().manual_seed(index)
            writer.add(
                index,
                {
                    "input_ids": torch.randint(0, 100, (5,), generator=draw),
                    "hidden": torch.randn(5, 4, generator=draw).bfloat16(),
                    "label": torch.randn(2, generator=draw),
                },
            )
        writer.close()
    return tmp_path


def read_all(directory: Path) -> list[int]:
    reader = ShardReader(directory, CaptureManifest.read(directory))
    return [len(reader[place]) for place in range(len(reader))]


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(directory: Path) -> None:
    """By verify wherever it is; by training everywhere but in the blanks behind the header."""
    path = directory / FIRST
    good = path.read_bytes()
    begin = min(entry.start for entry in read_header(OpenFile(path)).values())
    for place in range(0, len(good), 7):
        flip(path, place, place % 8)
        with pytest.raises(CaptureError, match="shard-00000"):
            verify_directory(directory, None, None, 0)
        blank = good[place : place + 1] == b" " and place < begin
        if not blank:
            with pytest.raises(CaptureError, match="shard-00000"):
                read_all(directory)
        path.write_bytes(good)
    assert len(read_all(directory)) == 7


def test_a_page_of_zeros_is_found(directory: Path) -> None:
    path = directory / FIRST
    data = path.read_bytes()
    start = read_header(OpenFile(path))["hidden"].start
    path.write_bytes(data[:start] + bytes(16) + data[start + 16 :])
    with pytest.raises(CaptureError, match="the sample of prompt 1 is not as written"):
        read_all(directory)
    with pytest.raises(CaptureError, match=r"its checksum is [0-9a-f]{32}, the manifest's"):
        verify_directory(directory, None, None, 0)


def test_a_sample_is_compared_the_first_time_it_is_read(directory: Path) -> None:
    reader = ShardReader(directory, CaptureManifest.read(directory))
    before = reader[0]["hidden"]
    start = read_header(OpenFile(directory / FIRST))["hidden"].start
    file = (directory / FIRST).open("r+b")
    with file:
        file.seek(start)
        file.write(b"\0\1")
    assert not torch.equal(reader[0]["hidden"], before)  # it is, but was right once
    with pytest.raises(CaptureError, match="prompt 1 is not as written"):
        ShardReader(directory, CaptureManifest.read(directory))[0]


def test_shards_in_each_others_place_are_found(directory: Path) -> None:
    manifest = CaptureManifest.read(directory)
    first, second = manifest.shards
    data = [(directory / shard.file).read_bytes() for shard in (first, second)]
    (directory / first.file).write_bytes(data[1])
    (directory / second.file).write_bytes(data[0])
    with pytest.raises(CaptureError, match=r"shard-00000\.safetensors .* capture -c RUN\.yaml da"):
        read_all(directory)
    for shard, content in zip(manifest.shards, data, strict=True):
        (directory / shard.file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CaptureError, match=r"(?s)shard-00000.*shard-00001") as told:
        verify_directory(directory, None, None, 0)
    assert str(told.value).count("Restore it from a copy") == 1


def test_counts_that_were_changed_are_found(directory: Path) -> None:
    path = directory / "token_counts.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(CaptureError, match="its checksum is"):
        read_token_counts(directory, CaptureManifest.read(directory))
    with pytest.raises(CaptureError, match="its checksum is"):
        verify_directory(directory, None, None, 0)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object], which: int = 0) -> None:
    """Change a shard, and make it and the manifest those of a time without checksums."""
    manifest = CaptureManifest.read(directory)
    shards = list(manifest.shards)
    path = directory / shards[which].file
    columns = load_file(path)
    del columns[CHECKSUMS]
    change(columns)
    save_file(columns, path)
    update = {"num_bytes": path.stat().st_size, "checksum": None, "table_checksum": None}
    shards[which] = shards[which].model_copy(update=update)
    manifest.model_copy(update={"shards": tuple(shards)}).write(directory)


def test_a_capture_without_checksums_is_read_and_verify_says_so(directory: Path) -> None:
    rewrite(directory, lambda columns: None)
    assert len(read_all(directory)) == 7
    report = str(verify_directory(directory, None, None, 0))
    assert "no checksum is of 1 of" in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({OFFSETS: [0, 5, 3, 15, 20]}, "its offsets do not grow from 0 on"),
        ({OFFSETS: [1, 5, 10, 15, 20]}, "its offsets do not grow from 0 on"),
        ({OFFSETS: [0, 5, 10, 15, 2**40]}, "it has 1099511627776 tokens, the manifest says 20"),
        ({OFFSETS: [0, 5, 10, 20]}, "it has 4 indices and 4 offsets for 4 samples"),
        ({INDEX: [1, 2, 3]}, "it has 3 indices and 5 offsets for 4 samples"),
        ({INDEX: [1, 2, 3, -7]}, "it names prompt -7"),
        ({INDEX: [1, 2, 3, 3]}, "it names a prompt twice"),
        ({INDEX: [1, 2, 3, 900]}, "names prompt 900, the manifest has 8 prompts"),
        ({SKIPPED: [1]}, "it names a prompt twice"),
        ({SKIPPED: [2**62]}, "names prompt 4611686018427387904"),
        ({"odd": [1]}, "it holds odd, which the manifest does not know"),
        ({"label": [[1.0, 2.0]]}, r"'label' is \[1, 2\], the manifest says \[4, 2\]"),
        ({"input_ids": [1] * 19}, r"'input_ids' is \[19\], the manifest says \[20\]"),
        ({"input_ids": [1.0] * 20}, "'input_ids' is F32, the manifest says int64"),
        ({INDEX: [1.0, 2.0, 3.0, 4.0]}, r"_index is F32 \[4\], not a row of int64"),
        ({OFFSETS: [[0, 5, 10, 15, 20]]}, r"_offsets is I64 \[1, 5\], not a row of int64"),
    ],
)
def test_a_row_table_that_does_not_agree_is_found_without_checksums(
    directory: Path, change: dict[str, list[float]], message: str
) -> None:
    rewrite(
        directory, lambda columns: columns.update({n: torch.tensor(v) for n, v in change.items()})
    )
    with pytest.raises(CaptureError, match=message):
        read_all(directory)
    with pytest.raises(CaptureError, match=message):
        verify_directory(directory, None, None, 0)


def test_another_dtype_of_a_later_shard_is_found_without_checksums(directory: Path) -> None:
    rewrite(directory, lambda columns: columns.update(hidden=columns["hidden"].float()), which=1)
    with pytest.raises(CaptureError, match=r"00001.*'hidden' is F32, the manifest says bfloat16"):
        read_all(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 3}, "do not make 8 prompts"),
        ({"num_tokens": 19}, "it has 20 tokens, the manifest says 19"),
        ({"num_bytes": 19}, "the manifest says 19 bytes"),
        ({"table_checksum": "0" * 32}, "the checksum of its row table is not the manifest's"),
    ],
)
def test_numbers_of_a_manifest_that_were_changed_are_found(
    directory: Path, change: dict[str, object], message: str
) -> None:
    manifest = CaptureManifest.read(directory)
    first = manifest.shards[0].model_copy(update=change)
    manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}).write(directory)
    with pytest.raises(CaptureError, match=message):
        read_all(directory)


def test_a_shard_taken_out_of_the_manifest_is_found(directory: Path) -> None:
    manifest = CaptureManifest.read(directory)
    manifest.model_copy(update={"shards": manifest.shards[1:]}).write(directory)
    with pytest.raises(CaptureError, match="do not make 8 prompts"):
        read_all(directory)
