"""From prompts to samples: the one path that offline and online training share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..config import RunConfig
from ..data.chat import load_tokenizer
from ..data.order import epoch_order
from ..data.prompts import PromptSet, load_prompts
from ..errors import CaptureError, ConfigError
from ..progress import track
from ..strategy import Strategy
from ..types import Adapter, Problem, Prompt, Sample, TargetEngine
from .hf import load_target_info
from .identity import capture_identity
from .layout import finite_advice, non_finite
from .manifest import CaptureManifest
from .recapture import Fresh, compare
from .writer import ShardWriter


def capture_in_order(
    engine: TargetEngine, adapter: Adapter, prompts: Iterable[Prompt], window: int
) -> Iterator[tuple[int, Sample | None]]:
    """Yield each prompt's index and sample, in the prompts' order; None where it is skipped.

    The engine is given `window` prompts at a time, which it may answer in any
    order.  Samples stay on the device they were captured on.  Raises CaptureError
    when the engine leaves out, repeats, invents or changes a prompt.
    """
    source = iter(prompts)
    while asked := list(islice(source, window)):
        # a prompt may occur twice, where an epoch ends and the next one begins
        waiting = {prompt.index: prompt for prompt in asked}
        last = {prompt.index: place for place, prompt in enumerate(asked)}
        ready: dict[int, Sample | None] = {}
        place = 0
        for capture in engine.capture(list(waiting.values()), adapter.spec):
            prompt = waiting.pop(capture.index, None)
            if prompt is None or not torch.equal(capture.input_ids.cpu(), prompt.input_ids.cpu()):
                raise CaptureError(
                    f"the target engine answered prompt {capture.index}, which it "
                    + ("was not asked" if prompt is None else "ran with other tokens")
                    + ". Try: target.engine=transformers"
                )
            ready[capture.index] = adapter(capture)
            while place < len(asked) and (index := asked[place].index) in ready:
                yield index, ready.pop(index) if last[index] == place else ready[index]
                place += 1
        if waiting:
            raise CaptureError(
                f"the target engine gave no states for prompt {min(waiting)} and "
                f"{len(waiting) - 1} more. Try: target.engine=transformers"
            )


def run_capture(run: RunConfig, strategy: Strategy) -> CaptureManifest:
    """Capture the run's data into `data.capture_dir`, going on where an earlier run stopped.

    Samples are stored in the order that training first sees them.  Raises a
    SpecForgeError for anything wrong before the first sample is written.
    """
    directory = _directory(run)
    info = load_target_info(run.target)
    adapter = strategy.adapter(run.strategy, info)
    tokenizer = load_tokenizer(run.target)
    identity = capture_identity(run, strategy, info, adapter.spec, tokenizer)
    prompts = load_prompts(run.data, tokenizer, info.vocab_size)
    order = epoch_order(len(prompts), run.train.seed, 0)
    digest = prompts_fingerprint(prompts, order)
    with ShardWriter(
        directory, identity, run.capture.shard_tokens, prompts=digest, num_prompts=len(prompts)
    ) as writer:
        if writer.manifest.complete:
            return writer.manifest
        engine = strategy.target_engine(run.target)
        try:
            _fill(Job(run, strategy, engine, adapter), writer, prompts, order)
        finally:
            engine.close()
        return writer.close()


def _directory(run: RunConfig) -> Path:
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


@dataclass(frozen=True, slots=True)
class Job:
    """Who captures, and for whom."""

    run: RunConfig
    strategy: Strategy
    engine: TargetEngine
    adapter: Adapter


def _fill(job: Job, writer: ShardWriter, prompts: PromptSet, order: Sequence[int]) -> None:
    """Capture what is not done yet; nothing is written before a first sample was verified."""
    counts = prompts.token_counts(job.engine.info.vocab_size)
    window = job.run.capture.window
    begun, tokens, started = False, 0, time.monotonic()
    with track("capturing", len(order)) as progress:
        progress.skip(len(writer.done))
        # windows begin at fixed places and run whole, so that a resumed capture batches as an
        # uninterrupted one does: another batch would round differently
        for start in range(0, len(order), window):
            chosen = order[start : start + window]
            if writer.done.issuperset(chosen):
                continue
            asked = [prompts[i] for i in chosen]
            for index, sample in capture_in_order(job.engine, job.adapter, asked, window):
                if index in writer.done:
                    continue
                if sample is None:
                    writer.skip(index)
                else:
                    stored = to_host(index, sample)
                    if not begun:
                        verify_first(job, writer.manifest, prompts[index], stored)
                        writer.begin(counts)
                        begun = True
                    writer.add(index, stored)
                tokens += len(prompts[index].input_ids)
                rate = tokens / (time.monotonic() - started)
                progress.advance(note=f"{rate:,.0f} tokens/s")


def to_host(index: int, sample: Sample) -> Sample:
    """Return a sample on the CPU; CaptureError naming the prompt where it is not finite."""
    if bad := non_finite(sample):
        dtype = sample[bad[0]].dtype
        raise CaptureError(
            f"prompt {index}: field {bad[0]!r} is not finite as the strategy's adapter returned "
            f"it ({dtype}). {finite_advice(dtype)}"
        )
    return {name: tensor.detach().cpu() for name, tensor in sample.items()}


def verify_first(job: Job, manifest: CaptureManifest, prompt: Prompt, sample: Sample) -> None:
    """Check a sample against the spec and a capture of its prompt alone; CaptureError if wrong."""
    spec = job.adapter.spec
    fresh = Fresh.of(job.engine, spec, prompt)
    problems: list[Problem] = job.strategy.verify_capture(
        job.run.strategy, spec, manifest, sample, fresh.capture()
    )
    problems = problems or compare(fresh, job.adapter, sample)
    if problems:
        listing = "\n  ".join(str(problem) for problem in problems)
        raise CaptureError(
            f"the first sample (prompt {prompt.index}) cannot be trained on:"
            f"\n  {listing}\nTry: specforge check {job.strategy.name}"
        )
