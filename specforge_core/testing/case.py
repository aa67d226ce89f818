"""A strategy on a toy target, for tests of it piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..capture.job import Job
from ..capture.samples import to_host
from ..draws import draws_of
from ..train.dist import world
from ..train.fsdp import cast_inputs
from ..types import (
    DataInfo,
    Draft,
    Proposer,
    Sample,
    StepContext,
    StepOutput,
    TargetCapture,
)
from .runs import load, write_run

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A strategy on a toy target: its captures, its samples, and a draft."""

    config: Path
    job: Job
    data: DataInfo
    captures: tuple[TargetCapture, ...]
    samples: tuple[Sample, ...]  # transformed
    draft: Draft

    @classmethod
    def open(cls, strategy: Mapping[str, Any], target: Path, directory: Path) -> Case:
        """Capture a few conversations, and build a draft whose weights are not its first ones."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"max_steps": 4, "schedule": "constant", "warmup_ratio": 0}
        settings |= {"batch_size": 1, "compute_dtype": "float32"}
        config = write_run(directory, target, conversations=6, strategy=strategy, train=settings)
        job = Job.open(*load(config))
        prompts = job.prompts()
        counts = prompts.token_counts(job.target.vocab_size)
        data = DataInfo(token_counts=counts, num_samples=len(prompts))
        engine = job.engine()
        try:
            captures = sorted(
                engine.capture(list(prompts), job.adapter.spec), key=lambda c: c.index
            )
        finally:
            engine.close()
        draft = cls.new_draft(job, data)
        cast_inputs(draft.model, torch.float32)  # as FSDP does; states are stored in bfloat16
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in draft.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
        case = cls(
            config=config, job=job, data=data, captures=tuple(captures), samples=(), draft=draft
        )
        samples = tuple(s for c in captures if (s := case.sample(c)) is not None)
        assert len(samples) > 1, "the adapter or the transform turned all samples down"
        return replace(case, samples=samples)

    @staticmethod
    def new_draft(job: Job, data: DataInfo | None = None) -> Draft:
        """Build a draft to train on this data, or without it one whose weights are to be loaded."""
        draft = job.strategy.draft(job.run.strategy, job.target, data)
        draft.model.float()
        if draft.frozen is not None:
            draft.frozen.float().requires_grad_(False)
        return draft

    def sample(self, capture: TargetCapture, *, max_length: int | None = None) -> Sample | None:
        """Store a capture and transform it; None when the strategy turns it down.

        `max_length` takes the place of the run's.
        """
        run, strategy = self.job.run, self.job.strategy
        stored = self.job.adapter(capture)
        if stored is None:
            return None
        longest = max_length or run.data.max_length
        transform = strategy.transform(run.strategy, self.job.adapter.spec, longest)
        generator = draws_of(run.train.seed, 0, capture.index)
        return transform(to_host(capture.index, stored), generator)

    def step(self, samples: Sequence[Sample]) -> StepOutput:
        """Collate samples and run the train step on them, in the middle of a run."""
        strategy, config = self.job.strategy, self.job.run.strategy
        batch = strategy.collate(config, self.job.adapter.spec, self.draft)(samples)
        with world(CPU) as alone:
            context = StepContext(
                step=2,
                total_steps=5,
                generator=torch.Generator().manual_seed(0),
                training=True,
                mesh=alone.mesh,
                progress=0.5,  # parts of a loss may be 0 at either end of a run
            )
            return strategy.train_step(config)(self.draft, batch, context)

    def proposer(self) -> Proposer:
        """Return what drafts with the case's draft."""
        self.draft.model.eval()
        return self.job.strategy.proposer(self.job.run.strategy, self.draft, self.job.target)
