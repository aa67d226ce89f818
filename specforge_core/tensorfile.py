"""Safetensors files in pieces: written from parts without copying them, read by byte range."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
import xxhash
from torch import Tensor

from .documents import open_regular
from .errors import CaptureError
from .files import replacing

CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
MAX_HEADER = 100_000_000  # bytes, as safetensors has it


class OpenFile:
    """A file open for reading at any place by any thread; closed when nobody has it any more."""

    def __init__(self, path: Path, advice: str = "Restore it from a copy") -> None:
        """Open it; `advice` is what can be done where it is damaged, which ends every error."""
        self.name, self.advice = str(path), advice
        try:
            self.number = open_regular(path)
        except OSError as exc:
            raise CaptureError(f"{path} cannot be read: {exc.strerror}. {advice}") from exc
        finalize(self, os.close, self.number)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in a file."""

    code: str  # of the dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    def rows(self, file: OpenFile, first: int, last: int) -> Tensor:
        """Read rows `first` to `last` (not included) of a tensor into memory of their own."""
        dtype, row = DTYPES[self.code], self.shape[1:]
        width = prod(row) * dtype.itemsize
        if not width or first == last:
            return torch.empty((last - first, *row), dtype=dtype)
        # numpy asks for huge pages: 3 times as fast for a sample of 80 MB as torch.empty
        raw = np.empty((last - first) * width, dtype=np.uint8)
        read_into(file, self.start + first * width, raw.data)
        return torch.from_numpy(raw).view(dtype).view(last - first, *row)


def read_header(file: OpenFile) -> dict[str, Entry]:
    """Return the tensors of an open safetensors file.

    Raises CaptureError when it is not one, or says of a tensor what cannot be: other
    bytes than its shape needs, or not all of the file's, each once.
    """
    try:
        size = int.from_bytes(os.pread(file.number, 8, 0), "little")
        length = os.fstat(file.number).st_size
        if not 2 <= size <= min(length - 8, MAX_HEADER):
            raise ValueError(f"a header of {size} bytes in a file of {length}")
        header = _parsed(os.pread(file.number, size, 8))
        entries = {
            name: _entry(name, entry, 8 + size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = 8 + size
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise ValueError(f"{name!r} begins at byte {entry.start}, and not at {end}")
            end = entry.end
        if end != length:
            raise ValueError(f"its tensors end at byte {end}, the file at {length}")
    except OSError as exc:
        raise CaptureError(f"{file.name} cannot be read: {exc.strerror}. {file.advice}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        why = "its header does not say what a tensor is"
        raise CaptureError(
            f"{file.name} is not a safetensors file, or is damaged: "
            f"{exc if type(exc) is ValueError else why}. {file.advice}"
        ) from exc
    return entries


def _parsed(header: bytes) -> dict[str, Any]:
    """Return a header; ValueError for what is none, not in the words of a parser."""
    try:
        found: dict[str, Any] = json.loads(header, object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError("its header is no JSON") from exc
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, none of whose names occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r:.60} occurs twice")
    return found


def _entry(name: str, told: dict[str, Any], data: int) -> Entry:
    """Return a tensor of a header, whose bytes count from `data` on; ValueError if it cannot be."""
    code, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    numbers = [*shape, *offsets]
    if not isinstance(code, str) or len(offsets) != 2:
        raise ValueError(f"{name!r} has dtype {code!r:.50} and offsets {offsets!r:.50}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name!r} has shape {shape!r:.50} and offsets {offsets!r:.50}")
    entry = Entry(code, tuple(shape), *(data + offset for offset in offsets))
    # other packages' files may have dtypes that are not known here
    if code in DTYPES and entry.end - entry.start != prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{name!r}, {code} {shape}, has {entry.end - entry.start} bytes")
    return entry


def read_into(file: OpenFile, offset: int, left: memoryview) -> None:
    """Fill a buffer from `offset` on; CaptureError when the file ends too early.

    Reads instead of a mapping: as fast, and a file cut off meanwhile is an error
    instead of a SIGBUS.
    """
    while left:
        try:
            count = os.preadv(file.number, [left], offset)
        except OSError as exc:
            raise CaptureError(
                f"{file.name} cannot be read: {exc.strerror}. {file.advice}"
            ) from exc
        if count == 0:
            raise CaptureError(
                f"{file.name} ends at byte {offset}, in the middle of its data: it is truncated. "
                f"{file.advice}"
            )
        left, offset = left[count:], offset + count


def write_tensors(path: Path, columns: Mapping[str, Sequence[Tensor]]) -> tuple[int, str]:
    """Write each column's tensors one after the other, joined along axis 0.

    Returns the file's size and its checksum, as `checksums.file_checksum` gives it.

    The file appears whole under its name or not at all, and is on the disk then.  Raises OSError.
    """
    # large items first keeps every tensor aligned to its item size
    order = sorted(columns, key=lambda name: (-columns[name][0].dtype.itemsize, name))
    header, end = {}, 0
    for name in order:
        parts = columns[name]
        start, end = end, end + sum(part.nbytes for part in parts)
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        header[name] = {
            "dtype": CODES[parts[0].dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with replacing(path) as file:
        for piece in _pieces(text, (part for name in order for part in columns[name])):
            digest.update(piece)
            file.write(piece)
    return 8 + len(text) + end, digest.hexdigest()


def _pieces(header: bytes, parts: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    yield from map(tensor_bytes, parts)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes in order, without a copy where they lie in order."""
    raw: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return raw
