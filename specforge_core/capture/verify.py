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
from ..errors import CaptureError
from ..progress import track
from ..strategy import Strategy
from ..text import counted
from ..types import Problem, Prompt, Sample
from .identity import check_identity
from .job import Job
from .layout import check_sample
from .manifest import AGAIN, FORMAT_VERSION, MANIFEST, CaptureManifest
from .recapture import Fresh, compare
from .samples import told
from .store import ShardReader, read_token_counts

MAX_PROBLEMS = 20  # what is shown; more of them say nothing new


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at, and found right."""

    directory: Path
    num_samples: int
    num_recaptured: int
    complete: bool
    unchecked: str = ""  # files of a version that wrote no checksums of them

    def __str__(self) -> str:
        again = f", {self.num_recaptured} of them captured again and equal"
        fine = "is as it should be" if self.num_samples == 1 else "are as they should be"
        rest = "" if self.complete else "; the capture is not complete yet"
        if self.unchecked:
            rest += (
                f"; no checksum is of {self.unchecked}, as an earlier version wrote none: changed "
                "bytes would not be seen"
            )
        return (
            f"{self.directory}: {counted(self.num_samples, 'sample')} {fine}"
            f"{again if self.num_recaptured else ''}{rest}"
        )


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
    if run is None or strategy is None:
        check = partial(check_sample, manifest.identity.spec(), manifest.identity.vocab_size)
        problems = _each(reader, lambda _, sample: check(sample))
    else:
        job = Job.open(run, strategy)
        check_identity(manifest.identity, job.identity, directory)
        adapter, target = job.adapter, job.target
        fresh = _recapture(job, reader, recapture)
        reader = ShardReader(directory, manifest, adapter.spec.fields)

        def ask(number: int, sample: Sample) -> list[Problem]:
            again = fresh[number].capture() if number in fresh else None
            found = strategy.verify_capture(run.strategy, target, adapter.spec, sample, again)
            return found or (compare(fresh[number], adapter, sample) if again else [])

        problems = _each(reader, ask)
    problems = chain(_counts(directory, manifest), problems)
    if shown := list(islice(problems, MAX_PROBLEMS)):
        listing, advice = told(shown, AGAIN)
        more = f"\n  (and perhaps more than these {MAX_PROBLEMS})"
        raise CaptureError(
            f"the capture in {directory} must not be trained on:{listing}"
            f"{more if len(shown) == MAX_PROBLEMS else ''}\n{advice}"
        )
    return VerifyReport(directory, len(reader), len(fresh), manifest.complete, _unchecked(manifest))


def _unchecked(manifest: CaptureManifest) -> str:
    """Say which files of a capture no checksum is of."""
    shards = sum(shard.checksum is None for shard in manifest.shards)
    found = [f"{shards} of {counted(len(manifest.shards), 'shard')}"] if shards else []
    found += [f"its {MANIFEST}"] if manifest.format_version < FORMAT_VERSION else []
    return " and ".join(found)


def _counts(directory: Path, manifest: CaptureManifest) -> Iterator[str]:
    """Check the counts of supervised tokens that lie beside the shards."""
    try:
        read_token_counts(directory, manifest)
    except CaptureError as exc:
        yield _problem(exc)


def _problem(exc: CaptureError) -> str:
    """Return what is wrong without what can be done, which is said once for all problems."""
    return str(exc).removesuffix(f". {AGAIN}")


def _each(reader: ShardReader, check: Callable[[int, Sample], list[Problem]]) -> Iterator[str]:
    """Check every shard and sample, and say which one a problem is in."""
    seen = Counter[int]()
    whole = True
    with track("verifying", len(reader)) as progress:
        for shard in range(len(reader.manifest.shards)):
            try:
                reader.check(shard)
            except CaptureError as exc:
                whole = False
                yield _problem(exc)
                continue
            seen.update(reader.handled(shard))
            for number in reader.rows(shard):
                for problem in check(number, reader[number]):
                    yield f"sample {number} (prompt {reader.prompt_index(number)}), {problem}"
                progress.advance()
    if whole:
        yield from _bookkeeping(reader, seen)


def _bookkeeping(reader: ShardReader, seen: Counter[int]) -> Iterator[str]:
    """Check that each prompt was stored or skipped once."""
    for index in sorted(index for index, count in seen.items() if count > 1):
        yield f"prompt {index} was stored or skipped {seen[index]} times"
    # those skipped after the last sample are in no shard
    skipped, told = seen.total() - len(reader), reader.manifest.num_skipped
    if skipped > told or (skipped < told and not reader.manifest.complete):
        yield f"{counted(skipped, 'prompt')} skipped, the manifest says {told}"


def _recapture(job: Job, reader: ShardReader, count: int) -> dict[int, Fresh]:
    """Run the target on `count` samples' prompts, spread evenly over the capture."""
    count = min(count, len(reader))
    chosen = [i * (len(reader) - 1) // max(count - 1, 1) for i in range(count)]
    if not chosen:
        return {}
    if not job.run.data.train:
        prompts = [_prompt(reader, number) for number in chosen]
    else:
        known = job.prompts()
        indices = [reader.prompt_index(number) for number in chosen]
        if (last := max(indices)) >= len(known):
            raise CaptureError(
                f"the capture has a sample of prompt {last}, but data.train has only {len(known)} "
                "prompts: it is not the data that was captured. Correct data.train"
            )
        prompts = [known[index] for index in indices]
    engine = job.engine()
    try:
        pairs = zip(chosen, prompts, strict=True)
        return {number: Fresh.of(engine, job.adapter.spec, prompt) for number, prompt in pairs}
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
    mask = sample.get("loss_mask", torch.ones_like(ids)).long()
    return Prompt(index=index, input_ids=ids, loss_mask=mask)
