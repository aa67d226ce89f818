"""Check stored samples: against the spec always, against the target itself when there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch

from ..config import RunConfig
from ..data.chat import load_tokenizer
from ..data.prompts import load_prompts
from ..errors import CaptureError
from ..progress import track
from ..strategy import Strategy
from ..types import Adapter, CaptureSpec, Problem, Prompt, Sample
from .hf import load_target_info
from .identity import capture_identity, check_identity
from .layout import layout_problems, non_finite
from .manifest import CaptureIdentity, CaptureManifest
from .recapture import Fresh, compare
from .store import ShardReader

MAX_PROBLEMS = 20  # what is shown; more of them say nothing new


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at, and found right."""

    directory: Path
    num_samples: int
    num_recaptured: int
    complete: bool

    def __str__(self) -> str:
        again = f", {self.num_recaptured} of them captured again and equal"
        rest = "" if self.complete else "; the capture is not complete yet"
        return (
            f"{self.directory}: {self.num_samples} samples are as they should be"
            f"{again if self.num_recaptured else ''}{rest}"
        )


def check_sample(spec: CaptureSpec, identity: CaptureIdentity, sample: Sample) -> list[Problem]:
    """Return what is wrong with a sample, whatever the strategy.

    Looks at names, shapes, dtypes, token counts and finiteness, at the range of
    `input_ids`, and that `loss_mask` is 0 or 1.
    """
    problems = layout_problems(spec.fields, sample)
    problems += [Problem(f"field {n!r}", "holds NaN or infinity") for n in non_finite(sample)]
    for name, most in (("input_ids", identity.vocab_size - 1), ("loss_mask", 1)):
        values = sample.get(name)
        if values is None or not values.numel():
            continue
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > most:
            problems.append(
                Problem(f"field {name!r}", f"has values {low} to {high}, allowed are 0 to {most}")
            )
    return problems


def verify_directory(
    directory: Path, run: RunConfig | None, strategy: Strategy | None, recapture: int
) -> VerifyReport:
    """Check every stored sample; with a run, its strategy's own checks and the target too.

    `recapture` samples, spread over the capture, are captured again from the
    run's own prompts (or, without data.train, from their stored tokens) and their
    values compared.  Raises CaptureError that lists the problems.
    """
    manifest = CaptureManifest.read(directory)
    reader = ShardReader(directory, manifest)
    fresh: dict[int, Fresh] = {}
    problems: Iterator[str] = _bookkeeping(manifest, reader)
    if run is None or strategy is None:
        check = partial(check_sample, manifest.identity.spec(), manifest.identity)
        problems = chain(problems, _each(reader, lambda _, sample: check(sample)))
    else:
        adapter = _matching_adapter(run, strategy, manifest, directory)
        fresh = _recapture(run, strategy, adapter.spec, reader, recapture)

        def ask(number: int, sample: Sample) -> list[Problem]:
            again = fresh[number].capture() if number in fresh else None
            found = strategy.verify_capture(run.strategy, adapter.spec, manifest, sample, again)
            return found or (compare(fresh[number], adapter, sample) if again else [])

        problems = chain(problems, _each(reader, ask))
    if shown := list(islice(problems, MAX_PROBLEMS)):
        listing = "\n  ".join(shown)
        more = f"\n  (and perhaps more than these {MAX_PROBLEMS})"
        raise CaptureError(
            f"the capture in {directory} must not be trained on:\n  {listing}"
            f"{more if len(shown) == MAX_PROBLEMS else ''}\n"
            "Capture again: specforge capture -c RUN.yaml data.capture_dir=EMPTY_DIRECTORY"
        )
    return VerifyReport(directory, len(reader), len(fresh), manifest.complete)


def _bookkeeping(manifest: CaptureManifest, reader: ShardReader) -> Iterator[str]:
    """Count the prompts: each stored or skipped once, and none left out at the end."""
    seen = Counter(reader.handled())
    for index in sorted(index for index, count in seen.items() if count > 1):
        yield f"prompt {index} was stored or skipped {seen[index]} times"
    done = len(reader) + manifest.num_skipped
    if manifest.complete and manifest.num_prompts not in (None, done):
        yield f"{done} prompts were stored or skipped, of {manifest.num_prompts}"


def _each(reader: ShardReader, check: Callable[[int, Sample], list[Problem]]) -> Iterator[str]:
    """Check every sample, and say which sample a problem is in."""
    with track("verifying", len(reader)) as progress:
        for number in range(len(reader)):
            for problem in check(number, reader[number]):
                yield f"sample {number} (prompt {reader.prompt_index(number)}), {problem}"
            progress.advance()


def _matching_adapter(
    run: RunConfig, strategy: Strategy, manifest: CaptureManifest, directory: Path
) -> Adapter:
    """Return the run's adapter; CaptureError when the capture is not of this run."""
    info = load_target_info(run.target)
    adapter = strategy.adapter(run.strategy, info)
    tokenizer = load_tokenizer(run.target)
    expected = capture_identity(run, strategy, info, adapter.spec, tokenizer)
    check_identity(manifest.identity, expected, directory)
    return adapter


def _recapture(
    run: RunConfig, strategy: Strategy, spec: CaptureSpec, reader: ShardReader, count: int
) -> dict[int, Fresh]:
    """Run the target on `count` samples' prompts, spread evenly over the capture."""
    count = min(count, len(reader))
    chosen = [i * (len(reader) - 1) // max(count - 1, 1) for i in range(count)]
    if not chosen:
        return {}
    if not run.data.train:
        prompts = [_prompt(reader, number) for number in chosen]
    else:
        vocab_size = load_target_info(run.target).vocab_size
        known = load_prompts(run.data, load_tokenizer(run.target), vocab_size)
        indices = [reader.prompt_index(number) for number in chosen]
        if (last := max(indices)) >= len(known):
            raise CaptureError(
                f"the capture has a sample of prompt {last}, but data.train has only {len(known)} "
                "prompts: it is not the data that was captured. Correct data.train"
            )
        prompts = [known[index] for index in indices]
    engine = strategy.target_engine(run.target)
    try:
        pairs = zip(chosen, prompts, strict=True)
        return {number: Fresh.of(engine, spec, prompt) for number, prompt in pairs}
    finally:
        engine.close()


def _prompt(reader: ShardReader, number: int) -> Prompt:
    """Return the prompt of a sample as far as the sample tells."""
    sample, index = reader[number], reader.prompt_index(number)
    if "input_ids" not in sample:
        raise CaptureError(
            "the samples hold no input_ids, so they can only be captured again from the data. "
            "Try: data.train=[FILE.jsonl]"
        )
    ids = sample["input_ids"].long()
    return Prompt(index, ids, sample.get("loss_mask", torch.ones_like(ids)).long())
