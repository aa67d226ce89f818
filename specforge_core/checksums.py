"""Checksums of files: XXH3 of 128 bits, as `xxhsum -H2` prints it.

They find what a disk, a network or a copy damaged, not what somebody forged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .documents import open_regular
from .errors import CheckpointError

SEAL = "checksum"  # in an object of JSON: that of all else in it
PIECE = 1 << 20  # bytes read at once: the buffer stays in the processor's cache


def file_checksum(path: Path) -> str:
    """Return the checksum of a whole file, 32 hexadecimal digits.  Raises OSError."""
    digest = xxhash.xxh3_128()
    piece = memoryview(bytearray(PIECE))
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def checksum(data: bytes) -> str:
    """Return the checksum of a file that holds `data`."""
    return xxhash.xxh3_128(data).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object of JSON with the checksum of its own values, however they are laid out."""
    plain = json.loads(json.dumps(document))  # keys that are numbers are texts when it is read
    return {**plain, SEAL: _seal(plain)}


def check_seal(document: Mapping[str, Any]) -> bool:
    """Compare an object with the checksum in it; ValueError for another.

    Returns False where it has none: a version wrote it that had none.
    """
    if SEAL not in document:
        return False
    if (found := _seal(document)) != document[SEAL]:
        raise ValueError(f"its checksum is {found}, {document[SEAL]!r:.40} was written")
    return True


def _seal(document: Mapping[str, Any]) -> str:
    values = {name: value for name, value in document.items() if name != SEAL}
    return checksum(json.dumps(values, sort_keys=True).encode())


def folder_checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every safetensors file of a folder by its name.  Raises OSError."""
    return {name: file_checksum(folder / name) for name in _tensor_files(folder)}


def check_folder(
    folder: Path, checksums: Mapping[str, str], advice: str, others: Iterable[str] = ()
) -> None:
    """Compare the safetensors files of a checkpoint or export with the checksums of their writer.

    `others` are files that are compared too, if they have one.  Nothing is compared where there
    are none: older versions wrote none.  Raises CheckpointError for a file that is missing, left
    over or other than it was written.
    """
    if not checksums:
        return
    found = set(_tensor_files(folder))
    if more := sorted(found - checksums.keys()):
        raise CheckpointError(f"{folder / more[0]} was not written with the others. {advice}")
    if missing := sorted(checksums.keys() - found - set(others)):
        raise CheckpointError(f"{folder / missing[0]} is missing. {advice}")
    for name, expected in sorted(checksums.items()):
        try:
            told = file_checksum(folder / name)
        except OSError as exc:
            raise CheckpointError(
                f"{folder / name} cannot be read: {exc.strerror}. {advice}"
            ) from exc
        if told != expected:
            raise CheckpointError(
                f"{folder / name} is damaged: its checksum is {told}, {expected} was written. "
                f"{advice}"
            )


def _tensor_files(folder: Path) -> Iterable[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))
