"""Open a run's data: offline from a capture directory, online from the target itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..capture.hf import load_target_info
from ..capture.identity import capture_identity, check_identity
from ..capture.manifest import MANIFEST, CaptureManifest
from ..capture.store import read_token_counts
from ..capture.worker import Job, to_host, verify_first
from ..config import RunConfig
from ..data.chat import load_tokenizer
from ..data.loader import NOTE_SECONDS, POLL_SECONDS, OnlineSource, Share, Source, StoredSource
from ..data.prompts import load_prompts
from ..errors import CaptureError, ConfigError
from ..progress import console
from ..strategy import Strategy
from ..types import Adapter, CaptureSpec, Sample, TargetCapture, TargetInfo


@dataclass(frozen=True, slots=True)
class Feed:
    """One rank's samples, and what the draft may know of them."""

    source: Source
    adapter: Adapter
    target: TargetInfo
    manifest: CaptureManifest
    epoch_length: int | None  # samples of one pass; None while the capture still grows
    token_counts: Tensor | None  # [V] supervised tokens; None while the capture still grows
    close: Callable[[], None]


def open_feed(run: RunConfig, strategy: Strategy, share: Share) -> Feed:
    """Return the feed that the config's data section asks for.

    Raises ConfigError when it asks for none, CaptureError when a capture does not fit.
    """
    if run.data.capture_dir is not None:
        return _offline(run, strategy, share)
    if run.data.train:
        return _online(run, strategy, share)
    raise ConfigError(
        "nothing to train on: give data.train=[FILE.jsonl] for online training, or "
        "data.capture_dir=DIR for a capture made with `specforge capture`"
    )


@dataclass(slots=True)
class CheckedAdapter:
    """An adapter whose first sample is checked before anything is trained on it."""

    inner: Adapter
    check: Callable[[int, Sample], None]  # the prompt's index, and what became of it
    checked: bool = False

    @property
    def spec(self) -> CaptureSpec:
        return self.inner.spec

    def __call__(self, capture: TargetCapture) -> Sample | None:
        sample = self.inner(capture)
        if sample is not None and not self.checked:
            self.check(capture.index, sample)
            self.checked = True
        return sample


def _offline(run: RunConfig, strategy: Strategy, share: Share) -> Feed:
    directory = run.data.capture_dir
    assert directory is not None
    if run.data.follow:
        _wait_for_manifest(directory)
    manifest = CaptureManifest.read(directory)
    target = load_target_info(run.target)
    adapter = strategy.adapter(run.strategy, target)
    tokenizer = load_tokenizer(run.target)
    check_identity(
        manifest.identity,
        capture_identity(run, strategy, target, adapter.spec, tokenizer),
        directory,
    )
    if not manifest.complete and not run.data.follow:
        raise CaptureError(
            f"the capture in {directory} is not complete ({manifest.num_samples} samples so far). "
            "Finish it with the same `specforge capture` command, or train while it grows: "
            "data.follow=true"
        )
    reader = strategy.reader(run.strategy, adapter.spec, manifest, directory)
    source = StoredSource(reader, share, f"is `specforge capture` still filling {directory}?")
    if manifest.complete and len(reader) == 0:
        raise CaptureError(f"the capture in {directory} has no samples. Check data.train")
    _, sample = next(source.samples(0))
    problems = strategy.verify_capture(run.strategy, adapter.spec, manifest, sample, None)
    if problems:
        listing = "\n  ".join(str(problem) for problem in problems)
        raise CaptureError(
            f"the first sample of {directory} cannot be trained on:\n  {listing}\n"
            f"Try: specforge verify {directory} -c RUN.yaml"
        )
    return Feed(
        source=source,
        adapter=adapter,
        target=target,
        manifest=manifest,
        epoch_length=len(reader) if manifest.complete else None,
        token_counts=read_token_counts(directory, manifest),
        close=_nothing,
    )


def _online(run: RunConfig, strategy: Strategy, share: Share) -> Feed:
    target = load_target_info(run.target)
    adapter = strategy.adapter(run.strategy, target)
    tokenizer = load_tokenizer(run.target)
    prompts = load_prompts(run.data, tokenizer, target.vocab_size)
    identity = capture_identity(run, strategy, target, adapter.spec, tokenizer)
    manifest = CaptureManifest(identity=identity)
    engine = strategy.target_engine(run.target)
    job = Job(run, strategy, engine, adapter)

    def check(index: int, sample: Sample) -> None:
        verify_first(job, manifest, prompts[index], to_host(index, sample))

    return Feed(
        source=OnlineSource(
            engine, CheckedAdapter(adapter, check), prompts, share, run.capture.window
        ),
        adapter=adapter,
        target=target,
        manifest=manifest,
        epoch_length=len(prompts),
        token_counts=prompts.token_counts(target.vocab_size),
        close=engine.close,
    )


def _wait_for_manifest(directory: Path) -> None:
    noted = time.monotonic()
    while not (directory / MANIFEST).exists():
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            console.print(f"waiting for `specforge capture` to begin in {directory}", markup=False)
        time.sleep(POLL_SECONDS)


def _nothing() -> None:
    """Close nothing: shards are mapped files."""
