"""Read samples from disk: shards, and a manifest that lists the finished ones."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..checksums import file_checksum
from ..errors import CaptureError
from ..files import inside
from ..tensorfile import CODES, OpenFile, read_header
from ..types import Sample
from .manifest import AGAIN, CaptureManifest
from .shardfile import OpenShard, check_file

MAX_OPEN = 256  # shards: a process may hold 1,024 files


class ShardReader:
    """Random access to a capture's samples, in the order they were stored.

    Every read is a copy of its own, straight from the page cache, and compared with its
    checksum the first time.  Threads may share it.
    """

    def __init__(
        self, directory: Path, manifest: CaptureManifest, fields: Collection[str] | None = None
    ) -> None:
        """Look at the size of every shard; CaptureError when one is missing or truncated.

        Of each sample `fields` are given, all of them if None.
        """
        self._directory = directory
        self._given = None if fields is None else frozenset(fields)
        self._fields = dict(manifest.identity.spec().fields)
        self._lock = threading.Lock()
        self._open: dict[int, OpenShard] = {}
        self._seen: dict[int, bytearray] = {}  # of every shard that was ever open
        self._supervised: dict[int, Tensor] = {}  # of every shard that was asked for it
        self._ends = [0]  # stored samples up to and with each shard
        self._use(manifest)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number, row = self._locate(index)
        sample = self._shard(number).sample(row)
        given = self._given
        return {name: sample[name] for name in sample if given is None or name in given}

    def num_tokens(self, index: int) -> int:
        """Return how many tokens a sample has, which is known without reading it."""
        number, row = self._locate(index)
        offsets = self._shard(number).offsets
        return offsets[row + 1] - offsets[row]

    def num_supervised(self, index: int) -> int:
        """Return how many of a sample's tokens are supervised; all, without a `loss_mask`.

        All masks of a shard lie side by side, and are read when the first one is asked for.
        """
        number, row = self._locate(index)
        if (counts := self._supervised.get(number)) is None:
            shard = self._shard(number)
            counts = torch.tensor(shard.offsets).diff()
            if (told := self._fields.get("loss_mask")) is not None and told.shape == (None,):
                masks = shard.entries["loss_mask"].rows(shard.file, 0, shard.offsets[-1])
                ends = torch.cat([torch.zeros(1, dtype=torch.long), (masks != 0).cumsum(0)])
                counts = ends[shard.offsets].diff()
            self._supervised[number] = counts
        return int(counts[row])

    def prompt_index(self, index: int) -> int:
        """Return which prompt a sample is of."""
        number, row = self._locate(index)
        return self._shard(number).index[row]

    def handled(self, number: int) -> Iterator[int]:
        """Yield the indices of the prompts that shard `number` stored or skipped."""
        shard = self._shard(number)
        yield from shard.index
        yield from shard.skipped

    def check(self, number: int) -> None:
        """Read shard `number` whole and compare it with the manifest; CaptureError if it differs.

        Without a checksum only its header and row table are compared.
        """
        shard = self.manifest.shards[number]
        check_file(self._directory / shard.file, shard)
        self._shard(number)

    def rows(self, number: int) -> range:
        """Return the places of the samples of shard `number`."""
        return range(*self._ends[number : number + 2])

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
            size = _size(path)
            if size != shard.num_bytes:
                state = "is missing" if size is None else f"has {size} bytes: it is truncated"
                raise CaptureError(
                    f"{path} {state} (the manifest says {shard.num_bytes} bytes). {AGAIN}"
                )
        self.manifest = manifest
        self._ends = [0, *accumulate(shard.num_samples for shard in manifest.shards)]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index) - 1
        return number, index - self._ends[number]

    def _shard(self, number: int) -> OpenShard:
        if (shard := self._open.get(number)) is not None:
            return shard
        with self._lock:  # of threads that read
            return self._opened(number)

    def _opened(self, number: int) -> OpenShard:
        if (shard := self._open.get(number)) is not None:
            return shard
        told = self.manifest.shards[number]
        shard = OpenShard.open(self._directory / told.file, told, self._fields)
        shard = replace(shard, seen=self._seen.setdefault(number, shard.seen))
        most = self.manifest.num_prompts
        if most is not None and (largest := max(*shard.index, *shard.skipped, -1)) >= most:
            raise CaptureError(
                f"{shard.file.name} names prompt {largest}, the manifest has {most} prompts. "
                f"{AGAIN}"
            )
        if len(self._open) >= MAX_OPEN:
            self._open.pop(next(iter(self._open)), None)
        self._open[number] = shard
        return shard


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def read_token_counts(directory: Path, manifest: CaptureManifest) -> Tensor | None:
    """Return how often each token is supervised, [V] int64; None while that is not known."""
    if manifest.token_counts is None:
        return None
    path = directory / manifest.token_counts
    try:
        inside(directory, manifest.token_counts)
        told = manifest.token_counts_checksum
        if told is not None and (found := file_checksum(path)) != told:
            raise ValueError(f"its checksum is {found}, the manifest's {told}")
        file = OpenFile(path, AGAIN)
        entry = read_header(file)["token_counts"]
        if (entry.code, entry.shape) != (CODES[torch.int64], (manifest.identity.vocab_size,)):
            raise ValueError(f"it holds {entry.code} {list(entry.shape)}")
        counts = entry.rows(file, 0, entry.shape[0])
        if counts.min() < 0:
            raise ValueError(f"it holds {int(counts.min())}")
    except (OSError, KeyError, ValueError) as exc:
        why = "it holds no token_counts" if isinstance(exc, KeyError) else exc
        raise CaptureError(
            f"{path} is missing or damaged ({why}), and the manifest names it. {AGAIN}"
        ) from exc
    return counts
