"""What is captured for a run, and `specforge capture`, which stores it."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..data.files import glance
from ..data.order import epoch_order
from ..data.prompts import Asked, PromptSet, run_prompts
from ..data.tokenrows import Fingerprint
from ..devices import pick_device
from ..errors import ConfigError, DataError
from ..progress import console, track
from ..stop import Interrupted
from ..strategy import Strategy
from ..target.info import load_target_info
from ..target.tokenizer import load_tokenizer
from ..types import Adapter, Prompt, TargetEngine, TargetInfo
from .identity import capture_identity
from .manifest import CaptureIdentity, CaptureManifest
from .samples import capture_in_order, check_first, to_host
from .store import read_token_counts
from .writer import VALIDATION as VALIDATION, ShardWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run's target, and what is captured from it: made once, in one place."""

    run: RunConfig
    strategy: Strategy
    target: TargetInfo
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    identity: CaptureIdentity

    @classmethod
    def open(cls, run: RunConfig, strategy: Strategy) -> Job:
        """Read the target's config and tokenizer, and a little of its weights; load nothing."""
        target = load_target_info(run.target)
        adapter = strategy.adapter(run.strategy, target)
        tokenizer = load_tokenizer(run.target)
        return cls(
            run=run,
            strategy=strategy,
            target=target,
            adapter=adapter,
            tokenizer=tokenizer,
            identity=capture_identity(run, strategy, target, adapter.spec, tokenizer),
        )

    def prompts(self, *, validation: bool = False) -> PromptSet:
        """Read and tokenize the run's conversations; with `validation` those held out."""
        return self.asked(validation=validation).load()

    def asked(self, *, validation: bool = False) -> Asked:
        """Open the run's conversations; with `validation` those held out."""
        known = self.identity.target_fingerprint, self.identity.tokenizer_fingerprint
        return run_prompts(
            self.run,
            self.strategy,
            self.target,
            self.tokenizer,
            Fingerprint.of(self.tokenizer, *known),
            validation=validation,
        )

    def engine(self) -> TargetEngine:
        """Load the target."""
        target = self.run.target
        return self.strategy.target_engine(target, pick_device(target.device, "target.device"))


def check_target(run: RunConfig, strategy: Strategy) -> str:
    """Load a run's target; say what is captured of it.

    Raises what a capture does before its first sample.
    """
    job = Job.open(run, strategy)
    engine = job.engine()
    why = getattr(engine, "why_padded", None)  # of this project's own engine
    engine.close()
    layers = ", ".join(str(layer) for layer in job.adapter.spec.layers)
    said = f"{strategy.name}: can be trained on {run.target.path}, from layers {layers or 'none'}"
    if why is None:
        return said
    return f"{said}\ncaptures: {f'padded, since {why}' if why else 'packed, without padding'}"


Prepare = Callable[[Job, int, int], None]


def run_capture(
    run: RunConfig, strategy: Strategy, prepare: Prepare | None = None
) -> CaptureManifest:
    """Capture the run's data into `data.capture_dir`, going on where an earlier run stopped.

    What `data.validation` holds out is captured first, into the folder `validation` there.
    Samples are stored in the order that training first sees them.  `prepare` is called with the
    number of samples and of tokens that are left, before the target is loaded.  Raises a
    SpecForgeError for anything wrong before the first sample is written.
    """
    directory = capture_directory(run)
    job = Job.open(run, strategy)
    asked = job.asked()
    prompts = asked.load()
    with ExitStack() as stack:

        @functools.cache
        def engine() -> TargetEngine:
            loaded = job.engine()
            stack.callback(loaded.close)
            return loaded

        def held_out() -> None:
            if run.data.validation != ():
                window = run.data.shuffle_window
                held = job.prompts(validation=True)
                _capture(job, engine, directory / VALIDATION, held, window)

        return _capture(
            job, engine, directory, prompts, asked.window, prepare=prepare, first=held_out
        )


def _capture(
    job: Job,
    engine: Callable[[], TargetEngine],
    directory: Path,
    prompts: PromptSet,
    window: int | None,
    *,
    prepare: Prepare | None = None,
    first: Callable[[], None] | None = None,
) -> CaptureManifest:
    """Capture prompts into a directory; what comes `first` only if they belong there."""
    order = epoch_order(len(prompts), job.run.train.seed, 0, window)
    digest = prompts_fingerprint(prompts, order)
    shard_tokens = job.run.capture.shard_tokens
    data = None
    with suppress(DataError):  # they may be no files, but what another package reads
        data = glance(job.run.data)
    writer = ShardWriter(
        *(directory, job.identity, shard_tokens),
        prompts=digest,
        num_prompts=len(prompts),
        data=data,
    )
    try:
        with writer:
            if prepare is not None and not writer.manifest.complete:
                left = [i for i in order if i not in writer.done]
                prepare(job, len(left), int(prompts.lengths[left].sum()))
            if first is not None:
                first()
            if writer.manifest.complete:
                read_token_counts(directory, writer.manifest)
                if first is not None:
                    console.print(
                        f"{directory} was complete before, and nothing is captured. Sizes and row "
                        "tables of its shards are as they were written; all bytes are compared "
                        f"by: specforge verify {directory}"
                    )
                return writer.manifest
            _fill(job, engine(), writer, prompts, order)
            return writer.close()
    except Interrupted as exc:
        exc.kept = f"{writer.manifest.num_samples} of {len(prompts)} samples are in {directory}"
        raise


def capture_directory(run: RunConfig) -> Path:
    """Return where a run's capture goes; ConfigError where it says none, or no data."""
    if run.data.capture_dir is None:
        raise ConfigError("data.capture_dir is not set. Try: data.capture_dir=DIRECTORY")
    if not run.data.train:
        raise ConfigError("data.train is empty. Try: data.train=[FILE.jsonl]")
    return run.data.capture_dir


def prompts_fingerprint(prompts: Sequence[Prompt], order: Iterable[int]) -> str:
    """Hash all prompts in the order they are captured."""
    digest = hashlib.sha256()
    for index in order:
        prompt = prompts[index]
        digest.update(f"{index} {len(prompt.input_ids)} ".encode())
        digest.update(prompt.input_ids.numpy().data)
        digest.update(prompt.loss_mask.numpy().data)
    return digest.hexdigest()


def _fill(
    job: Job, engine: TargetEngine, writer: ShardWriter, prompts: PromptSet, order: Sequence[int]
) -> None:
    """Capture what is not done yet; nothing is written before a first sample was verified."""
    counts = prompts.token_counts(job.target.vocab_size)
    window = job.run.capture.window
    begun, tokens, started = False, 0, time.monotonic()
    left = (i for i in order if i not in writer.done)
    check_first(job.strategy, job.run.strategy, engine, job.adapter, (prompts[i] for i in left))
    with track("capturing", len(order)) as progress:
        progress.advance(len(writer.done))
        # windows begin at fixed places and run whole, so that a resumed capture batches as an
        # uninterrupted one does: another batch would round differently
        for start in range(0, len(order), window):
            chosen = order[start : start + window]
            if writer.done.issuperset(chosen):
                continue
            asked = [prompts[i] for i in chosen]
            captured = capture_in_order(job.strategy, engine, job.adapter, asked, window)
            for prompt, (index, sample) in zip(asked, captured, strict=True):
                if index in writer.done:
                    continue
                if sample is None:
                    writer.skip(index)
                else:
                    stored = to_host(index, sample)
                    if not begun:
                        writer.begin(counts)
                        begun = True
                    writer.add(index, stored)
                tokens += len(prompt.input_ids)
                rate = tokens / (time.monotonic() - started)
                progress.advance(note=f"{rate:,.0f} tokens/s")
