"""One shard: a safetensors file, and a table of its rows that must agree with it.

Every field is one tensor: fields with a token axis joined along it, the others
stacked.  `_offsets` [n + 1] says where each sample's tokens begin, `_index` [n]
which prompt it is of, `_skipped` which prompts the strategy turned down on the
way, `_checksums` [n] what each sample's bytes come to.  The manifest holds the
checksum of this table, so that a sample is checked by reading no more than it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NoReturn

import torch
import xxhash
from torch import Tensor

from ..checksums import file_checksum
from ..errors import CaptureError
from ..tensorfile import CODES, Entry, OpenFile, read_header, tensor_bytes, write_tensors
from ..types import Field, Sample
from .layout import is_ragged, num_tokens
from .manifest import AGAIN, Shard

OFFSETS, INDEX, SKIPPED, CHECKSUMS = TABLE = ("_offsets", "_index", "_skipped", "_checksums")


def write_shard(
    path: Path,
    fields: Mapping[str, Field],
    rows: Sequence[tuple[int, Sample]],
    skipped: Sequence[int],
) -> Shard:
    """Write the samples of some prompts, and say what the manifest needs.  Raises OSError."""
    lengths = [num_tokens(fields, sample) for _, sample in rows]
    columns = {
        name: [s[name] if is_ragged(field) else s[name][None] for _, s in rows]
        for name, field in fields.items()
    }
    table = {
        OFFSETS: torch.tensor([0, *accumulate(lengths)]),
        INDEX: torch.tensor([index for index, _ in rows]),
        SKIPPED: torch.tensor(skipped, dtype=torch.int64),
        CHECKSUMS: torch.tensor([sample_checksum(index, sample) for index, sample in rows]),
    }
    size, checksum = write_tensors(path, columns | {name: [part] for name, part in table.items()})
    return Shard(
        file=path.name,
        num_samples=len(rows),
        num_tokens=sum(lengths),
        num_bytes=size,
        checksum=checksum,
        table_checksum=table_checksum(table.values()),
    )


def sample_checksum(index: int, sample: Sample) -> int:
    """Return the XXH3-64 of the prompt's index and of all fields by name, as an int64."""
    digest = xxhash.xxh3_64(index.to_bytes(8, "little", signed=True))
    for name in sorted(sample):
        digest.update(tensor_bytes(sample[name]))
    return int.from_bytes(digest.digest(), "big", signed=True)


def table_checksum(table: Iterable[Tensor]) -> str:
    """Return the XXH3-128 of a row table, its tensors in the order of TABLE."""
    digest = xxhash.xxh3_128()
    for part in table:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(tensor_bytes(part))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard whose header, row table and manifest were found to agree."""

    file: OpenFile
    fields: Mapping[str, Field]
    entries: Mapping[str, Entry]
    offsets: list[int]
    index: list[int]
    skipped: list[int]
    checksums: list[int] | None  # None: of a version that wrote none
    seen: bytearray = field(repr=False)  # 1 for each row whose checksum was compared

    @classmethod
    def open(cls, path: Path, shard: Shard, fields: Mapping[str, Field]) -> OpenShard:
        """Read a shard's header and row table.

        Raises CaptureError where they, the manifest's numbers and its fields do not agree.
        """
        file = OpenFile(path, AGAIN)
        entries = read_header(file)
        names = TABLE if shard.table_checksum is not None else TABLE[:-1]
        _check_names(file, {*fields, *names}, set(entries))
        table = [_table(file, entries[name], name) for name in names]
        if shard.table_checksum is not None and table_checksum(table) != shard.table_checksum:
            _damaged(file, "the checksum of its row table is not the manifest's")
        offsets, index, skipped, *rest = (part.tolist() for part in table)
        checksums = rest[0] if rest else None
        _check_rows(file, shard, offsets, index, skipped)
        if checksums is not None and len(checksums) != len(index):
            _damaged(file, f"it has {len(checksums)} checksums of {len(index)} samples")
        for name, field_ in fields.items():
            _check_field(file, name, field_, entries[name], shard)
        return cls(file, fields, entries, offsets, index, skipped, checksums, bytearray(len(index)))

    def sample(self, row: int) -> Sample:
        """Read a sample; CaptureError when its bytes are not those that were written."""
        first, last = self.offsets[row : row + 2]
        sample = {
            name: self.entries[name].rows(self.file, first, last)
            if is_ragged(field)
            else self.entries[name].rows(self.file, row, row + 1)[0]
            for name, field in self.fields.items()
        }
        if self.checksums is not None and not self.seen[row]:
            if sample_checksum(self.index[row], sample) != self.checksums[row]:
                _damaged(self.file, f"the sample of prompt {self.index[row]} is not as written")
            self.seen[row] = 1
        return sample


def check_file(path: Path, shard: Shard) -> None:
    """Read a whole shard and compare its checksum; CaptureError when it is another."""
    if shard.checksum is None:
        return
    try:
        found = file_checksum(path)
    except OSError as exc:
        raise CaptureError(f"{path} cannot be read: {exc.strerror}. {AGAIN}") from exc
    if found != shard.checksum:
        raise CaptureError(
            f"{path} is damaged: its checksum is {found}, the manifest's {shard.checksum}. {AGAIN}"
        )


def _check_names(file: OpenFile, promised: set[str], found: set[str]) -> None:
    if missing := promised - found:
        raise CaptureError(
            f"{file.name} lacks {', '.join(sorted(missing))}, which the manifest promises. {AGAIN}"
        )
    if more := found - promised:
        _damaged(file, f"it holds {', '.join(sorted(more))}, which the manifest does not know")


def _table(file: OpenFile, entry: Entry, name: str) -> Tensor:
    if entry.code != CODES[torch.int64] or len(entry.shape) != 1:
        _damaged(file, f"{name} is {entry.code} {list(entry.shape)}, not a row of int64")
    return entry.rows(file, 0, entry.shape[0])


def _check_rows(
    file: OpenFile, shard: Shard, offsets: list[int], index: list[int], skipped: list[int]
) -> None:
    """Compare the row table with itself and with the manifest's counts."""
    if len(index) != shard.num_samples or len(offsets) != len(index) + 1:
        told = f"{shard.num_samples} samples in the manifest"
        _damaged(file, f"it has {len(index)} indices and {len(offsets)} offsets for {told}")
    if offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
        _damaged(file, "its offsets do not grow from 0 on")
    if offsets[-1] != shard.num_tokens:
        _damaged(file, f"it has {offsets[-1]} tokens, the manifest says {shard.num_tokens}")
    handled = [*index, *skipped]
    if min(handled) < 0:
        _damaged(file, f"it names prompt {min(handled)}")
    if len(set(handled)) != len(handled):
        _damaged(file, "it names a prompt twice")


def _check_field(file: OpenFile, name: str, promised: Field, entry: Entry, shard: Shard) -> None:
    """Compare a tensor's dtype and shape with the manifest's fields."""
    dtype = getattr(torch, promised.dtype, None)
    if not isinstance(dtype, torch.dtype) or CODES.get(dtype) != entry.code:
        _damaged(file, f"{name!r} is {entry.code}, the manifest says {promised.dtype:.40}")
    if is_ragged(promised):
        expected = (shard.num_tokens, *promised.shape[1:])
    else:
        expected = (shard.num_samples, *promised.shape)
    if entry.shape != expected:
        _damaged(file, f"{name!r} is {list(entry.shape)}, the manifest says {list(expected)}")


def _damaged(file: OpenFile, what: str) -> NoReturn:
    raise CaptureError(f"{file.name} is damaged: {what}. {AGAIN}")
