"""One micro-batch through the strategy's step, in training and in validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batches.loader import Batches, Micro
from ..config import RunConfig
from ..strategy import Strategy
from ..types import CaptureSpec, Draft, Ratio, StepContext, StepOutput, TrainStep
from .dist import World
from .feed import share_of
from .metrics import check_scalars


@dataclass(frozen=True, slots=True)
class Forward:
    """Calls the step, and checks what it returns."""

    run: RunConfig
    strategy: Strategy
    step_function: TrainStep
    draft: Draft
    world: World

    def batches(self, spec: CaptureSpec, end: int | None) -> Batches:
        """Return what makes this rank's micro-batches, of the first `end` samples of all ranks."""
        run, strategy = self.run, self.strategy
        return Batches(
            strategy=strategy,
            spec=spec,
            transform=strategy.transform(run.strategy, spec, run.data.max_length),
            collate=strategy.collate(run.strategy, spec, self.draft),
            share=share_of(run, self.world.rank, self.world.size),
            batch_size=run.train.batch_size,
            device=self.world.device,
            end=end,
        )

    def context(
        self, step: int, total_steps: int, progress: float, *, training: bool = True
    ) -> StepContext:
        """Return where in the run a micro-batch is; validations draw the same at any step."""
        generator = torch.Generator()
        place = step if training else 0
        seed = (self.run.train.seed * 1_000_003 + place) * 65_537 + self.world.rank
        generator.manual_seed(seed % 2**63)
        return StepContext(
            step=step,
            total_steps=total_steps,
            generator=generator,
            training=training,
            mesh=self.world.mesh,
            progress=progress,
        )

    def __call__(self, micro: Micro, context: StepContext) -> StepOutput:
        """Return the step's sums: zeros for a micro-batch that only stands in."""
        hook = "specforge_train_step"
        with self.strategy.guard(hook):
            output = self.step_function(self.draft, micro.batch, context)
        self.strategy.check_returned(hook, output, StepOutput)
        who = f"{self.strategy.package}, {hook}"
        check_scalars(who, output, training=context.training)
        if micro.num_samples:
            return output
        nothing = {n: Ratio(num=r.num * 0, den=r.den * 0) for n, r in output.metrics.items()}
        return StepOutput(loss_sum=output.loss_sum * 0, weight=output.weight * 0, metrics=nothing)
