"""Write samples to a capture directory, so that a kill at any moment loses and doubles nothing.

A shard counts once the manifest names it.  What a killed writer had not yet
listed there is captured again by the next one.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..claim import told_of_others
from ..errors import CaptureError
from ..files import make_folder, open_own, refusing, sweep
from ..locks import hold
from ..progress import console
from ..tensorfile import write_tensors
from ..text import counted
from ..types import Sample
from .identity import check_identity
from .layout import layout_problems, num_tokens
from .manifest import FORMAT_VERSION, MANIFEST, CaptureIdentity, CaptureManifest
from .shardfile import write_shard
from .store import ShardReader

TOKEN_COUNTS = "token_counts.safetensors"
LOCK = ".lock"
VALIDATION = "validation"  # the folder in a capture for what is held out
OWN = {LOCK, TOKEN_COUNTS, VALIDATION}  # that a capture may have before its manifest
SHARDS = "shard-[0-9][0-9][0-9][0-9][0-9].safetensors"


class ShardWriter:
    """Appends samples to a capture directory, or goes on with one that was left unfinished.

    `done` holds the indices of all prompts stored or skipped by finished shards.
    A full shard is written in the background while the next one fills, so up to
    two shards are in memory.  Use as a context manager; leaving it by an error
    keeps the finished shards and drops the unfinished one.
    """

    def __init__(
        self,
        directory: Path,
        identity: CaptureIdentity,
        shard_tokens: int,
        *,
        prompts: str | None = None,
        num_prompts: int | None = None,
        data: str | None = None,
    ) -> None:
        """Lock the directory and read what is there; nothing is written yet.

        `prompts` is a fingerprint of the prompts in their order, `data` of the files that they are
        from.  Raises CaptureError when the directory holds another capture, is being written, or
        is not writable.
        """
        self.directory = directory
        self.manifest = CaptureManifest(
            identity=identity, prompts=prompts, num_prompts=num_prompts, data=data
        )
        self.done: set[int] = set()
        self._fields = dict(identity.spec().fields)
        self._shard_tokens = shard_tokens
        self._rows: list[tuple[int, Sample]] = []
        self._skipped: list[int] = []
        self._tokens = 0
        with refusing(CaptureError, "Try: data.capture_dir=ANOTHER_DIRECTORY", directory):
            make_folder(directory)
            self._lock = open_own(directory / LOCK)
        try:
            self._take_over(identity)
        except BaseException:
            self._lock.close()
            raise
        self._pool = ThreadPoolExecutor(1, "specforge-shards")
        self._writing: Future[None] | None = None

    def _take_over(self, identity: CaptureIdentity) -> None:
        if not hold(self._lock):
            raise CaptureError(
                f"another process is capturing into {self.directory}. Wait for it, or give "
                "another data.capture_dir"
            )
        if not (self.directory / MANIFEST).exists():
            if found := next(self.directory.glob("shard-*"), None):
                raise CaptureError(
                    f"{self.directory} has {found.name} but no {MANIFEST}: it is not clear what it "
                    "is of. Give an empty data.capture_dir"
                )
            self._clean()
            if others := sorted({path.name for path in self.directory.iterdir()} - OWN):
                console.print(told_of_others(self.directory, others, "capture"))
            return
        manifest = CaptureManifest.read(self.directory)
        check_identity(manifest.identity, identity, self.directory, resume=True)
        if manifest.prompts != self.manifest.prompts:
            raise CaptureError(
                f"the capture in {self.directory} was begun with other prompts, or another order "
                f"of them ({manifest.num_prompts} prompts then, {self.manifest.num_prompts} now). "
                "Give the same data and train.seed to go on with it, or another data.capture_dir"
            )
        reader = ShardReader(self.directory, manifest)
        for index in chain.from_iterable(map(reader.handled, range(len(manifest.shards)))):
            if index in self.done:
                raise CaptureError(
                    f"the capture in {self.directory} has prompt {index} twice. "
                    f"Try: specforge verify {self.directory}"
                )
            self.done.add(index)
        new = {"format_version": FORMAT_VERSION, "data": self.manifest.data}
        self.manifest = manifest.model_copy(update=new)
        self._clean()

    def _clean(self) -> None:
        """Remove what a killed writer had not listed yet: this one writes it again."""
        sweep(self.directory)
        listed = {shard.file for shard in self.manifest.shards}
        for path in self.directory.glob(SHARDS):
            if path.name not in listed:
                path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        self._lock.close()

    def begin(self, token_counts: Tensor) -> None:
        """Make the manifest visible, so that a trainer can follow; counts are [V] int64."""
        with self._guard():
            _, checksum = write_tensors(
                self.directory / TOKEN_COUNTS, {"token_counts": [token_counts]}
            )
        self._save_manifest(token_counts=TOKEN_COUNTS, token_counts_checksum=checksum)

    def add(self, index: int, sample: Sample) -> None:
        """Store the sample of prompt `index`; its tensors are on the CPU and not changed later.

        Raises CaptureError when it does not fit the spec, or the disk is full.
        """
        if problems := layout_problems(self._fields, sample):
            raise CaptureError(f"prompt {index}: {problems[0]}")
        self._rows.append((index, sample))
        self._tokens += num_tokens(self._fields, sample)
        if self._tokens >= self._shard_tokens:
            self._flush()
        elif self._writing is not None and self._writing.done():
            self._wait()

    def skip(self, index: int) -> None:
        """Remember that the strategy turned prompt `index` down."""
        self._skipped.append(index)

    def close(self) -> CaptureManifest:
        """Write what is left and mark the capture complete; CaptureError if there is no sample."""
        if self._rows:
            self._flush()
        self._wait()
        if not self.manifest.shards:
            raise CaptureError(
                f"the strategy skipped all {len(self._skipped)} prompts (too short, or nothing "
                "supervised), so there is nothing to store. Check data.train and data.max_length"
            )
        skipped = self.manifest.num_skipped + len(self._skipped)
        self._save_manifest(complete=True, num_skipped=skipped)
        return self.manifest

    def _flush(self) -> None:
        self._wait()
        rows, skipped = self._rows, self._skipped
        self._rows, self._skipped, self._tokens = [], [], 0
        self._writing = self._pool.submit(self._write, rows, skipped)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, rows: list[tuple[int, Sample]], skipped: list[int]) -> None:
        file = f"shard-{len(self.manifest.shards):05d}.safetensors"
        with self._guard():
            shard = write_shard(self.directory / file, self._fields, rows, skipped)
        self._save_manifest(
            shards=(*self.manifest.shards, shard),
            num_skipped=self.manifest.num_skipped + len(skipped),
        )

    def _save_manifest(self, **update: object) -> None:
        manifest = self.manifest.model_copy(update=update)
        with self._guard():
            manifest.write(self.directory)
        self.manifest = manifest

    def _guard(self) -> AbstractContextManager[None]:
        return refusing(
            CaptureError,
            f"Safe so far: {counted(self.manifest.num_samples, 'sample')} in "
            f"{counted(len(self.manifest.shards), 'shard')}. "
            "Make room there, then run the same command again to go on",
        )
