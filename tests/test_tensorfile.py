from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.checksums import file_checksum
from specforge_core.errors import CaptureError
from specforge_core.tensorfile import CODES, OpenFile, read_header, read_into, write_tensors


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_written_is_what_safetensors_and_the_byte_reader_read(
    dtype: torch.dtype, tmp_path: Path
):
    parts = [torch.randint(0, 2, (n, 3)).to(dtype) for n in (4, 0, 2)]
    columns = {"x": parts, "flags": [torch.tensor([True])]}
    size, checksum = write_tensors(tmp_path / "a.safetensors", columns)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    assert checksum == file_checksum(tmp_path / "a.safetensors")
    whole = load_file(tmp_path / "a.safetensors")
    assert whole["x"].dtype == dtype
    assert torch.equal(whole["x"].float(), torch.cat(parts).float())
    file = OpenFile(tmp_path / "a.safetensors")
    rows = read_header(file)["x"].rows(file, 3, 5)
    assert rows.dtype == dtype
    assert torch.equal(rows.float(), whole["x"][3:5].float())


def test_strided_parts_are_written_in_order(tmp_path: Path):
    part = torch.arange(6).reshape(2, 3).T
    write_tensors(tmp_path / "a", {"x": [part]})
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


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tensors(tmp_path / "f", {"x": [torch.tensor([1])]})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "f", {"x": [torch.tensor([2])]})
    assert load_file(tmp_path / "f")["x"].tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def write_header(path: Path, header: object, data: bytes = bytes(24)) -> OpenFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return OpenFile(path)


GOOD = {
    "a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [16, 24]},
}


def test_a_header_that_agrees_with_its_file_is_read(tmp_path: Path):
    assert set(read_header(write_header(tmp_path / "f", GOOD))) == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3]}, r"'a', I64 \[3\], has 16 bytes"),
        ({"shape": [-2]}, r"'a' has shape \[-2\]"),
        ({"shape": [2.0]}, r"'a' has shape \[2.0\]"),
        ({"shape": [True, 2]}, r"'a' has shape \[True, 2\]"),
        ({"shape": "22"}, "'a' has shape '22'"),
        ({"shape": None}, "is damaged"),
        ({"shape": [2**70]}, r"'a' has shape \["),
        ({"dtype": 5}, "'a' has dtype 5"),
        ({"dtype": "I32"}, r"'a', I32 \[2\], has 16 bytes"),
        ({"data_offsets": [0]}, "'a' has dtype"),
        ({"data_offsets": [-8, 8]}, r"'a' has shape \[2\] and offsets \[-8, 8\]"),
        ({"data_offsets": [0, 10**30]}, "'a' has shape"),
        ({"data_offsets": [8, 24]}, "'a' begins at byte"),
        ({"data_offsets": [0, 8], "shape": [1]}, "'b' begins at byte"),
        ({"data_offsets": [16, 0]}, "has -16 bytes"),
    ],
)
def test_a_header_that_says_what_cannot_be_is_an_error(
    change: dict[str, object], message: str, tmp_path: Path
):
    header = {**GOOD, "a": {**GOOD["a"], **change}}
    with pytest.raises(CaptureError, match=f"(?s)is damaged.*{message}|{message}"):
        read_header(write_header(tmp_path / "f", header))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], bytes(0), "is damaged"),
        ({"a": []}, bytes(0), "is damaged"),
        ({"a": None}, bytes(0), "is damaged"),
        (b'{"a": ' + b"[" * 100_000, bytes(0), "is damaged"),
        (json.dumps(GOOD).replace('"b"', '"a"').encode(), bytes(24), "the name 'a' occurs twice"),
        (GOOD, bytes(32), r"its tensors end at byte \d+, the file at \d+"),
        (GOOD, bytes(8), r"its tensors end at byte \d+, the file at \d+"),
    ],
)
def test_a_header_of_another_form_is_an_error(
    header: object, data: bytes, message: str, tmp_path: Path
):
    with pytest.raises(CaptureError, match=message):
        read_header(write_header(tmp_path / "f", header, data))


def test_a_file_is_closed_when_nobody_has_it(tmp_path: Path):
    (tmp_path / "f").touch()
    file = OpenFile(tmp_path / "f")
    number = file.number
    os.fstat(number)
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nothing", "its header is no JSON"),
        (b"\xff\xfe", "its header is no JSON"),
        (b"[" * 100_000, "its header is no JSON"),
        (b"[]", "its header does not say what a tensor is"),
        (b'{"a": {}}', "its header does not say what a tensor is"),
        (b'{"a": 1, "a": 2}', "the name 'a' occurs twice"),
        (b"33", "its header does not say what a tensor is"),
    ],
)
def test_a_header_that_is_none_is_told_in_words(
    tmp_path: Path, header: bytes, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    expected = f"x.safetensors is not a safetensors file, or is damaged: {message}. So be it"
    with pytest.raises(CaptureError) as told:
        read_header(OpenFile(path, "So be it"))
    assert str(told.value).endswith(expected)
