"""States that were captured online, kept on disk up to a quota, for later epochs and runs.

One file a sample, named by what it is of: the target, the spec, the tokens.  It holds the fields'
bytes, one behind the other, and ENDING: what the spec says is not said again, and one read takes
all of it.  Any number of processes share a folder: whoever writes or removes holds its lock, and
counts bytes before they are there and until they are gone, so that no kill lets the folder grow
over its quota.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np
import torch
import xxhash

from ..config import CacheConfig
from ..errors import CaptureError
from ..files import append, make_folder, open_own, replacing, sweep
from ..locks import hold
from ..progress import console
from ..strategy import Strategy
from ..tensorfile import OpenFile, read_into, tensor_bytes
from ..types import Adapter, CaptureSpec, Field, Prompt, Sample, TargetEngine
from .layout import layout_problems, non_finite, num_tokens
from .manifest import CaptureIdentity
from .samples import capture_in_order

FORMAT = 2
LOCK, USAGE, SUFFIX = ".lock", ".usage", ".states"
ENDING = struct.Struct("<qQ")  # tokens, and the XXH3-64 of all that is before it
OWN_BYTES = 64  # of the lock and the count
SLACK = 0.05  # of the quota that is freed beyond what is needed, so that the folder is rarely read
POLL_SECONDS = 0.002


class StateCache:
    """Samples by their prompt.  What is not there, or damaged, is not found; nothing raises."""

    def __init__(self, options: CacheConfig, about: Sequence[object], spec: CaptureSpec) -> None:
        """Open a folder, making it if need be; `about` says of what the samples are.

        Raises OSError where the folder cannot be written.
        """
        self.directory, self.max_bytes = options.dir, options.max_bytes - OWN_BYTES
        self.hits = self.misses = 0
        self._about = json.dumps([FORMAT, *about], default=str, sort_keys=True).encode()
        self._fields: Mapping[str, Field] = spec.fields
        dtypes = {name: getattr(torch, field.dtype) for name, field in spec.fields.items()}
        # large items first keeps every tensor aligned to its item size
        names = sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))
        self._dtypes: Mapping[str, torch.dtype] = {name: dtypes[name] for name in names}
        self._writes = True
        make_folder(self.directory)
        with self._locked():
            self._make_room(0)

    @classmethod
    def of(
        cls, options: CacheConfig, identity: CaptureIdentity, engine: str, dtype: str | None
    ) -> StateCache:
        """Return the cache of a run's captures by an engine that computes in `dtype`."""
        kept = ("target_fingerprint", "layers", "final", "next_tokens", "logsumexp", "fields")
        told = identity.model_dump(include={*kept, "spec_version"}, mode="json")
        return cls(options, [told, engine, dtype], identity.spec())

    def get(self, prompt: Prompt) -> Sample | None:
        """Return a prompt's sample on the CPU; None where it is to be captured."""
        path = self._path(prompt)
        try:
            found = self._read(path) if path.exists() else None
        except (
            CaptureError,
            OSError,
            LookupError,
            ValueError,
            TypeError,
            RuntimeError,
            struct.error,
        ):
            # damaged, not ours to read, or just removed
            found = None
            self._remove(path)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, prompt: Prompt, sample: Sample) -> None:
        """Keep a finite sample that is on the CPU, if it fits; the oldest ones make room."""
        if not self._writes or non_finite(sample) or layout_problems(self._fields, sample):
            return
        pieces = [tensor_bytes(sample[name]) for name in self._dtypes]
        need = sum(map(len, pieces)) + ENDING.size
        if need > self.max_bytes:
            return
        path = self._path(prompt)
        try:
            with self._locked():
                if path.exists():  # another process was faster
                    return
                used = self._make_room(need)
                with replacing(path, sync=False) as file:
                    file.writelines(pieces)
                    file.write(ENDING.pack(num_tokens(self._fields, sample), _checksum(pieces)))
                self._count(used + need)
        except OSError as exc:
            self._writes = False
            why = f"{exc.filename or self.directory}: {exc.strerror}"
            console.print(f"no more states are kept in capture.cache ({why})")

    def _path(self, prompt: Prompt) -> Path:
        digest = hashlib.blake2b(self._about, digest_size=20)
        for tensor in (prompt.input_ids, prompt.loss_mask):
            digest.update(tensor.contiguous().numpy().data)
        return self.directory / f"{digest.hexdigest()}{SUFFIX}"

    def _read(self, path: Path) -> Sample:
        """Read a file, and raise what comes where it is not as it was written."""
        file = OpenFile(path)
        # numpy asks for huge pages: 3 times as fast for a sample of 80 MB as torch.empty
        raw = np.empty(os.fstat(file.number).st_size, dtype=np.uint8)
        read_into(file, 0, raw.data)
        end = len(raw) - ENDING.size
        tokens, checksum = ENDING.unpack(raw.data[end:])
        if checksum != xxhash.xxh3_64_intdigest(raw.data[:end]):
            raise ValueError(f"{path} is not as it was written")
        sample, place, whole = {}, 0, torch.from_numpy(raw)
        for name, dtype in self._dtypes.items():
            shape = [tokens if size is None else size for size in self._fields[name].shape]
            first, place = place, place + prod(shape) * dtype.itemsize
            sample[name] = whole[first:place].view(dtype).view(shape)
        if place != end:
            raise ValueError(f"{path} is of another layout")
        return sample

    def _remove(self, path: Path) -> None:
        with suppress(OSError), self._locked():
            size = path.stat().st_size
            path.unlink()
            self._count(self._used() - size)

    def _make_room(self, need: int) -> int:
        """Remove the oldest files until `need` more bytes fit; return what is used without them.

        They are counted from now on.
        """
        used = self._used() if need else None
        if used is None or used + need > self.max_bytes:
            used = self._evict(need)
        self._count(used + need)
        return used

    def _evict(self, need: int) -> int:
        """Look at all files, and return the bytes of those that stay."""
        sweep(self.directory)  # nobody writes now: what is half-written is a killed process's
        found = []
        for entry in os.scandir(self.directory):
            if entry.name.endswith(SUFFIX):
                told = entry.stat()
                found.append((told.st_mtime_ns, entry.name, told.st_size))
        used = sum(size for _, _, size in found)
        if used + need > self.max_bytes:
            most = max(0.0, (1 - SLACK) * self.max_bytes - need)
            for _, name, size in sorted(found):
                if used <= most:
                    break
                (self.directory / name).unlink(missing_ok=True)
                used -= size
        return used

    def _used(self) -> int:
        """Return the bytes that are counted; all of the quota where that cannot be read."""
        try:
            return int((self.directory / USAGE).read_bytes())
        except (OSError, ValueError):
            return self.max_bytes

    def _count(self, used: int) -> None:
        with open_own(self.directory / USAGE) as file:
            append(file, str(used).encode(), 0, sync=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open_own(self.directory / LOCK) as lock:
            while not hold(lock):
                time.sleep(POLL_SECONDS)
            yield


def _checksum(pieces: Iterable[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def capture_through(
    cache: StateCache,
    strategy: Strategy,
    engine: TargetEngine,
    adapter: Adapter,
    prompts: Iterable[Prompt],
    window: int,
) -> Generator[tuple[int, Sample | None]]:
    """Yield what `capture_in_order` does, on the CPU; only what is not kept is captured."""
    asked = list(prompts)
    kept = {p.index: found for p in asked if (found := cache.get(p)) is not None}
    missing = [prompt for prompt in asked if prompt.index not in kept]
    fresh = capture_in_order(strategy, engine, adapter, missing, window)
    for prompt in asked:
        if prompt.index in kept:
            yield prompt.index, kept[prompt.index]
            continue
        index, sample = next(fresh)
        if sample is not None:
            # all on the CPU: a batch may have samples of both kinds
            sample = {name: tensor.detach().cpu() for name, tensor in sample.items()}
            cache.put(prompt, sample)
        yield index, sample
    for _ in fresh:  # to the end, where the engine's answers are counted
        pass
