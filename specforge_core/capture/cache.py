"""States that were captured online, kept on disk up to a quota, for later epochs and runs.

One file a sample, named by what it is of: the target, the spec, the tokens.  Any number of
processes share a folder: whoever writes or removes holds its lock, and counts bytes before they
are there and until they are gone, so that no kill lets the folder grow over its quota.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..config import CacheConfig
from ..errors import CaptureError
from ..files import append, make_folder, open_own, sweep
from ..locks import hold
from ..progress import console
from ..strategy import Strategy
from ..tensorfile import OpenFile, read_header, write_tensors
from ..types import Adapter, CaptureSpec, Field, Prompt, Sample, TargetEngine
from .layout import layout_problems, non_finite
from .manifest import CaptureIdentity
from .samples import capture_in_order
from .shardfile import sample_checksum

FORMAT = 1
LOCK, USAGE, SUFFIX, CHECKSUM = ".lock", ".usage", ".safetensors", "_checksum"
OWN_BYTES = 64  # of the lock and the count
HEADER_BYTES = 256  # of a file, and of each field in it: at most
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
        except (CaptureError, OSError, LookupError, ValueError, TypeError, RuntimeError):
            # damaged, not ours to read, or just removed
            found = None
            self._remove(path)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, prompt: Prompt, sample: Sample) -> None:
        """Keep a finite sample that is on the CPU, if it fits; the oldest ones make room."""
        need = sum(t.nbytes for t in sample.values()) + HEADER_BYTES * (len(sample) + 2)
        if not self._writes or need > self.max_bytes or non_finite(sample):
            return
        path = self._path(prompt)
        columns = {name: [t if t.ndim else t[None]] for name, t in sample.items()}
        columns[CHECKSUM] = [torch.tensor([sample_checksum(0, sample)])]
        try:
            with self._locked():
                if path.exists():  # another process was faster
                    return
                used = self._make_room(need)
                size, _ = write_tensors(path, columns, sync=False)
                self._count(used + size)
        except OSError as exc:
            self._writes = False
            console.print(
                f"no more states are kept in capture.cache ({exc.filename}: {exc.strerror})",
                markup=False,
            )

    def _path(self, prompt: Prompt) -> Path:
        digest = hashlib.blake2b(self._about, digest_size=20)
        for tensor in (prompt.input_ids, prompt.loss_mask):
            digest.update(tensor.contiguous().numpy().data)
        return self.directory / f"{digest.hexdigest()}{SUFFIX}"

    def _read(self, path: Path) -> Sample:
        """Read a file, and raise what comes where it is not as it was written."""
        file = OpenFile(path)
        entries = read_header(file)
        told = entries.pop(CHECKSUM).rows(file, 0, 1)
        sample: dict[str, Tensor] = {}
        for name, entry in entries.items():
            tensor = entry.rows(file, 0, entry.shape[0])
            sample[name] = tensor if self._fields[name].shape else tensor[0]
        if layout_problems(self._fields, sample) or sample_checksum(0, sample) != told.item():
            raise ValueError(f"{path} is not as it was written")
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


def capture_through(
    cache: StateCache,
    strategy: Strategy,
    engine: TargetEngine,
    adapter: Adapter,
    prompts: Iterable[Prompt],
    window: int,
) -> Iterator[tuple[int, Sample | None]]:
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
