from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.errors import CaptureError
from specforge_core.tensorfile import CODES, OpenFile, read_header, read_into, write_file


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_written_is_what_safetensors_and_the_byte_reader_read(
    dtype: torch.dtype, tmp_path: Path
):
    parts = [torch.randint(0, 2, (n, 3)).to(dtype) for n in (4, 0, 2)]
    columns = {"x": parts, "flags": [torch.tensor([True])]}
    size = write_file(tmp_path / "a.safetensors", columns)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    whole = load_file(tmp_path / "a.safetensors")
    assert whole["x"].dtype == dtype
    assert torch.equal(whole["x"].float(), torch.cat(parts).float())
    file = OpenFile(tmp_path / "a.safetensors")
    rows = read_header(file)["x"].rows(file, 3, 5)
    assert rows.dtype == dtype
    assert torch.equal(rows.float(), whole["x"][3:5].float())


def test_strided_parts_are_written_in_order(tmp_path: Path):
    part = torch.arange(6).reshape(2, 3).T
    write_file(tmp_path / "a", {"x": [part]})
    assert load_file(tmp_path / "a")["x"].tolist() == part.tolist()


def test_files_that_safetensors_wrote_are_read(tmp_path: Path):
    save_file({"a": torch.arange(5.0), "b": torch.ones(2, 2)}, tmp_path / "f", {"format": "pt"})
    file = OpenFile(tmp_path / "f")
    header = read_header(file)
    assert set(header) == {"a", "b"}
    assert header["a"].rows(file, 0, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 4) + b"nope"]
)
def test_another_kind_of_file_is_an_error(content: bytes, tmp_path: Path):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CaptureError, match="not a safetensors file, or is damaged"):
        read_header(OpenFile(tmp_path / "f"))


def test_reading_past_the_end_is_an_error(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"12345")
    with pytest.raises(CaptureError, match="ends at byte 5, in the middle of its data"):
        read_into(OpenFile(tmp_path / "f"), 0, memoryview(bytearray(8)))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    write_file(tmp_path / "f", {"x": [torch.tensor([1])]})
    (tmp_path / ".f.tmp").mkdir()  # cannot be opened for writing
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "f", {"x": [torch.tensor([2])]})
    assert load_file(tmp_path / "f")["x"].tolist() == [1]


def test_a_file_is_closed_when_nobody_has_it(tmp_path: Path):
    (tmp_path / "f").touch()
    file = OpenFile(tmp_path / "f")
    number = file.number
    os.fstat(number)
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
