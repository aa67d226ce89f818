"""One micro-batch through the strategy's step, in training and in validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..batches.loader import Batches, Micro
from ..config import RunConfig
from ..draws import draws_of
from ..errors import PluginError
from ..strategy import Strategy
from ..types import CaptureSpec, Draft, Ratio, StepContext, StepOutput, TrainStep
from .dist import World
from .feed import share_of


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
        return StepContext(
            step=step,
            total_steps=total_steps,
            generator=draws_of(self.run.train.seed, step if training else 0, self.world.rank),
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


def check_scalars(who: str, output: StepOutput, *, training: bool = True) -> None:
    """Raise PluginError for a StepOutput whose parts are no scalars, or that trains nothing."""
    if not isinstance(output.metrics, Mapping) or not all(map(_is_name, output.metrics)):
        raise PluginError(
            f"{who}: returned the metrics {output.metrics!r:.80}, expected a Ratio by name"
        )
    parts: dict[str, object] = {"loss_sum": output.loss_sum, "weight": output.weight}
    for name, ratio in output.metrics.items():
        if not isinstance(ratio, Ratio):
            raise PluginError(
                f"{who}: returned the metric {name!r} as {type(ratio).__name__}, expected a Ratio, "
                "whose num and den are summed over the ranks"
            )
        parts[f"{name}.num"], parts[f"{name}.den"] = ratio.num, ratio.den
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.ndim:
            is_ = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise PluginError(f"{who}: returned a {name} {is_}, expected a tensor without axes")
        if value.is_complex():
            raise PluginError(f"{who}: returned a {name} of complex numbers, expected a real one")
        if value.device.type == "meta":
            raise PluginError(f"{who}: returned a {name} on the meta device, expected a number")
    if training and not output.loss_sum.requires_grad:
        raise PluginError(f"{who}: returned a loss_sum without a gradient. Is it detached?")


def _is_name(name: object) -> bool:
    return type(name) is str and name.isprintable() and bool(name.strip())
