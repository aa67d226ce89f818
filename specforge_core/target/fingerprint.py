"""What tells one target's weights from another's, by reading a little of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..documents import read_object
from ..tensorfile import OpenFile, read_header
from ..types import TargetInfo
from .weights import fetch, tensor_files

SAMPLED_TENSORS = 256
SAMPLED_BYTES = 1024
VOLATILE = ("transformers_version", "_name_or_path", "_commit_hash")  # change without the model


def target_fingerprint(info: TargetInfo) -> str:
    """Hash the target's config.json, every tensor's name and shape, and bytes of some of them.

    Where the files are, and how the weights are split over them, does not matter.
    """
    digest = hashlib.sha256()
    if (path := fetch(info, "config.json")) is not None:
        kept = {key: value for key, value in read_object(path).items() if key not in VOLATILE}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    files = tensor_files(info)
    every = max(1, len(files) // SAMPLED_TENSORS)
    sampled = set(sorted(files)[::every])
    pieces: dict[str, bytes] = {}
    for path in sorted(set(files.values())):
        pieces |= _pieces(path, sampled)
    for name in sorted(pieces):
        digest.update(pieces[name])
    return digest.hexdigest()


def _pieces(path: Path, sampled: Iterable[str]) -> dict[str, bytes]:
    """Return what is hashed of each tensor of a file."""
    pieces = {}
    file = OpenFile(path)
    for name, entry in read_header(file).items():
        pieces[name] = f"{name} {entry.code} {entry.shape}".encode()
        if name in sampled:
            middle = entry.start + (entry.end - entry.start) // 2
            pieces[name] += os.pread(file.number, min(SAMPLED_BYTES, entry.end - middle), middle)
    return pieces
