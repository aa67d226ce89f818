"""Open a run's data: offline from a capture directory, online from the target itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..batches.loader import (
    OnlineSource,
    Prompts,
    Share,
    Source,
    StoredSource,
)
from ..batches.made import device_of
from ..batches.stored import NOTE_SECONDS, POLL_SECONDS
from ..capture.cache import StateCache
from ..capture.identity import check_identity
from ..capture.job import VALIDATION, Job
from ..capture.manifest import MANIFEST, CaptureIdentity, CaptureManifest
from ..capture.samples import LOOK_AT_ONCE, LOOKS, check_first, refuse
from ..capture.store import read_token_counts
from ..config import RunConfig
from ..data.files import glance
from ..data.order import Order
from ..data.prompts import PromptSet
from ..data.stream import Stream
from ..errors import CaptureError, ConfigError, DataError
from ..files import refusing
from ..locks import InTurn
from ..progress import console
from ..strategy import Strategy
from ..types import CaptureSpec, DataInfo, TargetEngine, TargetInfo
from .machine import choose


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One rank's samples of `data.validation`."""

    source: Source
    num_samples: int  # of all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """One rank's samples, and what the draft may know of them."""

    source: Source
    spec: CaptureSpec
    target: TargetInfo
    identity: CaptureIdentity
    data: DataInfo
    close: Callable[[], None]
    skipped: Mapping[str, int]  # reason -> rows of data.train that are not trained on
    num_tokens: int | None  # of an epoch; None while that is not known
    held_out: HeldOut | None = None
    engine: TargetEngine | None = None  # online
    loading: float = 0.0  # seconds until the engine was there
    # held by whoever calls the engine; None where only the source of the training does
    lock: InTurn | None = None
    first_window: int | None = None  # rows shuffled together in the first epoch, if others

    def captures_on(self, device: torch.device) -> bool:
        """Say whether the target captures beside the training, on this process's device."""
        return self.engine is not None and device_of(self.engine).type == device.type

    def stop(self) -> None:
        """End whatever waits for a sample, or captures, in another thread."""
        self.source.close()
        if self.held_out is not None:
            self.held_out.source.close()


class Counted(DataInfo):
    """What is known of rows that are still tokenized: who asks for their tokens waits for all."""

    _prompts: PromptSet | Stream
    _vocab_size: int

    def __init__(self, prompts: PromptSet | Stream, vocab_size: int) -> None:
        known = len(prompts) if isinstance(prompts, PromptSet) else None
        values = {"num_samples": known, "_prompts": prompts, "_vocab_size": vocab_size}
        for name, value in values.items():  # it is frozen
            object.__setattr__(self, name, value)

    @cached_property
    def token_counts(self) -> Tensor:
        return self._prompts.token_counts(self._vocab_size)


def share_of(run: RunConfig, rank: int, ranks: int) -> Share:
    """Return what one rank of a run takes of the data.

    Of a capture that is still written the next sample is taken when it is there: there ranks are
    not balanced.
    """
    batch = 1 if run.data.follow else run.train.batch_size
    seed, window, tokens = run.train.seed, run.data.shuffle_window, run.train.batch_tokens
    return Share(rank, ranks, seed, window, batch=batch, tokens=tokens)


def open_feed(run: RunConfig, strategy: Strategy, share: Share, *, whole: bool = False) -> Feed:
    """Return the feed that the config's data section asks for; `whole` when all rows are known.

    Raises ConfigError when it asks for none, CaptureError when a capture does not fit.
    """
    if run.data.capture_dir is not None:
        return _offline(Job.open(run, strategy), run.data.capture_dir, share)
    if run.data.train:
        return _online(Job.open(run, strategy), share, whole=whole)
    raise ConfigError(
        "nothing to train on: give data.train=[FILE.jsonl] for online training, or "
        "data.capture_dir=DIR for a capture made with `specforge capture`"
    )


def _offline(job: Job, directory: Path, share: Share) -> Feed:
    run, strategy, spec = job.run, job.strategy, job.adapter.spec
    if run.data.follow:
        _wait_for_manifest(directory)
    finish = (
        "Finish it with the same `specforge capture` command, or train while it grows: "
        "data.follow=true"
    )
    manifest, source = _stored(job, directory, share, "data.train", finish, grows=run.data.follow)
    if share.rank == 0:
        if run.data.train:
            _tell_other_data(run, directory, manifest)
        if (captured := manifest.identity.max_length) > run.data.max_length:
            console.print(
                f"note: conversations of the capture in {directory} have up to {captured} tokens, "
                f"and data.max_length={run.data.max_length} of them are trained on. Those whose "
                "answers stand behind are left out"
            )
    reader = source.reader
    sample = next(source.samples(0)).sample
    if sample is None:  # fewer than ranks: another's
        sample = reader[0]
    problems = strategy.verify_capture(run.strategy, job.target, spec, sample, None)
    again = f"Try: specforge verify {directory} -c RUN.yaml"
    refuse(problems, f"the first sample of {directory}", again)
    return Feed(
        source=source,
        spec=spec,
        target=job.target,
        identity=job.identity,  # the capture may hold more, which the draft does not read
        data=DataInfo(
            token_counts=read_token_counts(directory, manifest),
            num_samples=len(reader) if manifest.complete else None,
        ),
        close=_nothing,
        skipped={},  # the capture told of them
        num_tokens=manifest.num_tokens if manifest.complete else None,
        held_out=_held_out_offline(job, directory, share) if run.data.validation != () else None,
    )


def _tell_other_data(run: RunConfig, directory: Path, manifest: CaptureManifest) -> None:
    """Say where `data.train` is not what was captured: nothing of it is read."""
    if manifest.data is None:  # no files, but what another package may read
        return
    try:
        found = glance(run.data)
    except DataError as exc:
        console.print(f"note: the capture in {directory} is trained on, without data.train: {exc}")
        return
    if found not in (None, manifest.data):
        console.print(
            f"note: the capture in {directory} is trained on, and data.train, data.limit, data.mix "
            "or data.validation is no longer what it was made of. Try: specforge verify "
            f"{directory} -c RUN.yaml"
        )


def _held_out_offline(job: Job, directory: Path, share: Share) -> HeldOut:
    """Read what `specforge capture` stored of `data.validation`."""
    place = directory / VALIDATION
    again = "Capture it with the same config: specforge capture -c RUN.yaml"
    if not (place / MANIFEST).exists():
        raise CaptureError(f"data.validation is not captured: {place} is not there. {again}")
    _, source = _stored(job, place, share, "data.validation", again, grows=False)
    return HeldOut(source=source, num_samples=len(source.reader))


def _stored(
    job: Job, directory: Path, share: Share, option: str, finish: str, *, grows: bool
) -> tuple[CaptureManifest, StoredSource]:
    """Open a capture of what `option` names; `finish` says what to do where it is not complete."""
    manifest = CaptureManifest.read(directory)
    check_identity(manifest.identity, job.identity, directory)
    if not manifest.complete and not grows:
        count = manifest.num_samples
        raise CaptureError(
            f"the capture in {directory} is not complete ({count} samples so far). {finish}"
        )
    reader = job.strategy.reader(job.run.strategy, job.adapter.spec, job.target, directory)
    if manifest.complete and len(reader) == 0:
        raise CaptureError(f"the capture in {directory} has no samples. Check {option}")
    note = f"is `specforge capture` still filling {directory}?"
    return manifest, StoredSource(reader, share, note, longest=job.run.data.max_length)


def _online(job: Job, share: Share, *, whole: bool) -> Feed:
    run, strategy, adapter = job.run, job.strategy, job.adapter
    asked = job.asked()
    # epochs are counted before the first step, so there all rows are waited for
    steps, grows = run.train.max_steps is not None, run.train.regenerate_every is not None
    early = asked.window is not None and steps and not whole and not grows
    prompts = asked.stream() if early else asked.load()
    with ExitStack() as stack:
        stack.callback(prompts.close)
        held_out = job.prompts(validation=True) if run.data.validation != () else None
        # the target runs for the training and for all that watches it: one at a time
        shared = held_out is not None or run.train.eval_every is not None or grows
        lock = InTurn() if shared else None
        cache = _cache(job)  # what cannot be written is said before the target is loaded
        began = time.perf_counter()
        engine = job.engine()
        loading = time.perf_counter() - began
        stack.callback(engine.close)
        ordered = replace(share, first=asked.window)
        order = Order(share.seed, share.window, prompts.wait, ordered.first)
        first = range(prompts.wait(LOOKS * LOOK_AT_ONCE))
        looked = (prompts[order.at(place)[1]] for place in first)
        check_first(strategy, run.strategy, engine, adapter, looked)
        close = stack.pop_all().close
    known = prompts if isinstance(prompts, PromptSet) else None

    def source(prompts: Prompts, share: Share) -> OnlineSource:
        window = run.capture.window
        window = min(window, prompts.wait(window))  # none is asked for twice
        return OnlineSource(strategy, engine, adapter, prompts, share, window, cache, lock)

    return Feed(
        source=source(prompts, ordered),
        spec=adapter.spec,
        target=job.target,
        identity=job.identity,
        data=Counted(prompts, job.target.vocab_size),
        close=close,
        skipped={} if known is None else known.skipped,
        num_tokens=None if known is None else known.num_tokens,
        held_out=None
        if held_out is None
        else HeldOut(source=source(held_out, share), num_samples=len(held_out)),
        engine=engine,
        loading=loading,
        lock=lock,
        first_window=ordered.first,
    )


def _cache(job: Job) -> StateCache | None:
    run, options = job.run, job.run.capture.cache
    if options is None:
        return None
    with refusing(ConfigError, "Try: capture.cache.dir=DIR", options.dir):
        return StateCache.of(options, job.identity, run.target.engine, choose(run).target_dtype)


def _wait_for_manifest(directory: Path) -> None:
    noted = time.monotonic()
    while not (directory / MANIFEST).exists():
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            console.print(f"waiting for `specforge capture` to begin in {directory}")
        time.sleep(POLL_SECONDS)


def _nothing() -> None:
    """Close nothing: shards are files that close themselves."""
