"""Read samples from disk: safetensors shards, and a manifest that lists the finished ones.

In a shard every field is one tensor: fields with a token axis joined along it,
the others stacked.  `_offsets` [n + 1] says where each sample's tokens begin,
`_index` [n] which prompt it is of, `_skipped` which prompts the strategy turned
down on the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from ..errors import CaptureError
from ..tensorfile import Entry, OpenFile, read_header
from ..types import Sample
from .layout import is_ragged
from .manifest import CaptureManifest

OFFSETS, INDEX, SKIPPED = "_offsets", "_index", "_skipped"
MAX_OPEN = 256  # shards: a process may hold 1,024 files


class ShardReader:
    """Random access to a capture's samples, in the order they were stored.

    Every read is a copy of its own, straight from the page cache.  Threads may share it.
    """

    def __init__(self, directory: Path, manifest: CaptureManifest) -> None:
        """Look at the size of every shard; CaptureError when one is missing or truncated."""
        self._directory = directory
        self._fields = dict(manifest.identity.spec().fields)
        self._open: dict[int, _Shard] = {}
        self._ends = [0]  # stored samples up to and with each shard
        self._use(manifest)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number, row = self._locate(index)
        shard = self._shard(number)
        first, last = shard.offsets[row : row + 2]
        return {
            name: shard.entries[name].rows(shard.file, first, last)
            if is_ragged(field)
            else shard.entries[name].rows(shard.file, row, row + 1)[0]
            for name, field in self._fields.items()
        }

    def prompt_index(self, index: int) -> int:
        """Return which prompt a sample is of."""
        number, row = self._locate(index)
        return self._shard(number).index[row]

    def handled(self) -> Iterator[int]:
        """Yield the indices of all prompts that were stored or skipped."""
        for number in range(len(self.manifest.shards)):
            shard = self._shard(number)
            yield from shard.index
            yield from shard.skipped

    def refresh(self) -> bool:
        """See the shards added since; True once the capture is complete.

        Raises CaptureError when the directory now holds another capture.
        """
        manifest = CaptureManifest.read(self._directory)
        known = self.manifest.shards
        if manifest.identity != self.manifest.identity or manifest.shards[: len(known)] != known:
            raise CaptureError(
                f"the capture in {self._directory} was replaced while it was read. Start again"
            )
        self._use(manifest)
        return manifest.complete

    def _use(self, manifest: CaptureManifest) -> None:
        for shard in manifest.shards[len(self._ends) - 1 :]:
            path = self._directory / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.num_bytes:
                state = "is missing" if size is None else f"has {size} bytes: it is truncated"
                raise CaptureError(
                    f"{path} {state} (the manifest says {shard.num_bytes} bytes). Restore it from "
                    "a copy, or capture again into an empty directory"
                )
        self.manifest = manifest
        self._ends = [0, *accumulate(shard.num_samples for shard in manifest.shards)]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index) - 1
        return number, index - self._ends[number]

    def _shard(self, number: int) -> _Shard:
        if (shard := self._open.get(number)) is not None:
            return shard
        file = OpenFile(self._directory / self.manifest.shards[number].file)
        entries = read_header(file)
        if missing := {*self._fields, OFFSETS, INDEX, SKIPPED} - entries.keys():
            raise CaptureError(
                f"{file.name} lacks {', '.join(sorted(missing))}, which the manifest promises. "
                "Restore it from a copy, or capture again into an empty directory"
            )
        offsets, index, skipped = (
            entries[name].rows(file, 0, entries[name].shape[0]).tolist()
            for name in (OFFSETS, INDEX, SKIPPED)
        )
        if len(self._open) >= MAX_OPEN:
            self._open.pop(next(iter(self._open)), None)
        shard = self._open[number] = _Shard(file, entries, offsets, index, skipped)
        return shard


@dataclass(frozen=True, slots=True)
class _Shard:
    file: OpenFile
    entries: dict[str, Entry]
    offsets: list[int]
    index: list[int]
    skipped: list[int]


def read_token_counts(directory: Path, manifest: CaptureManifest) -> Tensor | None:
    """Return how often each token is supervised, [V] int64; None while that is not known."""
    if manifest.token_counts is None:
        return None
    path = directory / manifest.token_counts
    try:
        file = OpenFile(path)
        entry = read_header(file)["token_counts"]
        return entry.rows(file, 0, entry.shape[0])
    except (OSError, KeyError) as exc:
        raise CaptureError(
            f"{path} is missing or damaged, and the manifest names it. Restore it from a copy, or "
            "capture again into an empty directory"
        ) from exc
