"""Safetensors files in pieces: written from parts without copying them, read by byte range."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

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


class OpenFile:
    """A file open for reading at any place by any thread; closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.number = os.open(path, os.O_RDONLY)
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
    """Return the tensors of an open safetensors file; CaptureError when it is not one."""
    try:
        size = int.from_bytes(os.pread(file.number, 8, 0), "little")
        header: dict[str, Any] = json.loads(os.pread(file.number, size, 8))
        return {
            name: Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + size + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as exc:
        raise CaptureError(
            f"{file.name} is not a safetensors file, or is damaged. Restore it from a copy"
        ) from exc


def read_into(file: OpenFile, offset: int, left: memoryview) -> None:
    """Fill a buffer from `offset` on; CaptureError when the file ends too early.

    Reads instead of a mapping: as fast, and a file cut off meanwhile is an error
    instead of a SIGBUS.
    """
    while left:
        count = os.preadv(file.number, [left], offset)
        if count == 0:
            raise CaptureError(
                f"{file.name} ends at byte {offset}, in the middle of its data: it is truncated. "
                "Restore it from a copy, or capture again into an empty directory"
            )
        left, offset = left[count:], offset + count


def write_tensors(path: Path, columns: Mapping[str, Sequence[Tensor]]) -> int:
    """Write each column's tensors one after the other, joined along axis 0; return the size.

    The file appears whole under its name or not at all.  Raises OSError.
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
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in columns[name]:
                file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return 8 + len(text) + end
