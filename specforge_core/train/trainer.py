"""The training loop: the same for every strategy, data source and number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ..batches.loader import Batches, Micro, Share
from ..batches.prefetch import Prefetcher
from ..config import RunConfig
from ..drafts.checkpoint import TrainState, check_strategy, checkpoints, find, read_state
from ..errors import RunError
from ..progress import console, track
from ..strategy import Strategy
from ..types import Draft, Ratio, StepContext, StepOutput, TrainStep
from . import checkpoint, metrics
from .dist import World
from .feed import Feed
from .machine import Machine
from .optim import local_gradients, lr_factor, set_learning_rate, square_norm
from .resume import check_optimizer, learning_rate_change


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished (or stopped) run reached."""

    step: int
    total_steps: int
    num_tokens: int
    seconds: float
    checkpoint: Path
    finished: bool  # the schedule came to its end, by steps or by time


@dataclass(slots=True)
class Phases:
    """Seconds spent in each part of the step since the last log.

    A GPU works behind the host's back: the times are exact only with
    `train.profile`, which waits for it after each part.
    """

    exact: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(slots=True)
class Trainer:
    """What the loop works on.  Built by `train`, which also takes it apart."""

    run: RunConfig
    strategy: Strategy
    world: World
    machine: Machine
    feed: Feed
    draft: Draft
    model: FSDPModule
    optimizers: list[Optimizer]
    schedule: Callable[[float], float]
    step_function: TrainStep
    reducer: metrics.Reducer
    trackers: metrics.Trackers
    total_steps: int
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    position: int = 0  # samples of the endless sequence of epochs, of all ranks
    stop_asked: bool = False  # of this rank, by a signal at any moment
    stopping: bool = False  # as all ranks agreed
    time_up: bool = False  # another step would end after train.max_minutes
    began: float = 0.0  # when training would have begun, had it never been interrupted

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of this output directory, if any."""
        found = checkpoints(self.run.output_dir)
        if not found:
            return
        state = read_state(found[-1])
        check_strategy(found[-1], state, self.strategy.name)
        check_optimizer(found[-1], state, self.run.train)
        checkpoint.load(found[-1], self.draft, self.optimizers)
        self.step, self.num_tokens, self.seconds = state.step, state.num_tokens, state.seconds
        self._watch_time(self.step, self.seconds)
        self.position = state.position
        if self.world.main:
            console.print(f"resuming at step {self.step} from {found[-1]}", markup=False)
            change = learning_rate_change(state, self.run.train, self.total_steps, self.strategy)
            if change is not None:
                console.print(change, markup=False)

    def loop(self) -> TrainReport:
        """Train until the last step or a signal to stop; save; say where."""
        config = self.run.train
        self.trackers.start(self._info())
        batches = self._batches()
        phases = Phases(config.profile)
        window = metrics.Sums()
        since, tokens_then = time.monotonic(), self.num_tokens
        self.began = since - self.seconds
        saved = None
        label = f"training {self.strategy.name}"
        try:
            with track(label, self.total_steps, quiet=not self.world.main) as progress:
                progress.skip(self.step)
                if config.max_minutes is not None:
                    progress.deadline = self.began + 60 * config.max_minutes
                while not self._ended():
                    sums, norm = self._optimizer_step(batches, phases)
                    window.merge(sums)
                    self.step += 1
                    self.seconds = time.monotonic() - self.began
                    last = self._ended()
                    now = time.monotonic()
                    rate = (self.num_tokens - tokens_then) / (now - since)
                    loss = window.ratios().get("loss", math.nan)
                    progress.advance(1, f"loss {loss:.3f}  {rate:,.0f} tokens/s")
                    if self.world.main and (self.step % config.log_every == 0 or last):
                        self._log(window, norm, rate, phases)
                        window, since, tokens_then = metrics.Sums(), now, self.num_tokens
                    if self.step % config.save_every == 0 or last:
                        saved = self._save()
        finally:
            batches.close()
        if saved is None:  # resumed after the last step
            saved = find(self.run.output_dir)
        finished = self.step == self.total_steps or self.time_up
        return TrainReport(
            self.step, self.total_steps, self.num_tokens, self.seconds, saved, finished
        )

    def _ended(self) -> bool:
        return self.step >= self.total_steps or self.stopping or self.time_up

    def _watch_time(self, steps: int, seconds: float) -> float:
        """Return the place in the schedule, in steps, after `steps` of them and `seconds`.

        Says also whether another step of the usual length would end too late.
        """
        minutes = self.run.train.max_minutes
        if minutes is None:
            return steps
        mean = seconds / max(steps, 1)
        self.time_up = seconds + mean > 60 * minutes
        return max(steps, self.total_steps * seconds / (60 * minutes))

    def _batches(self) -> Prefetcher[Micro]:
        run, strategy, spec = self.run, self.strategy, self.feed.spec
        batches = Batches(
            strategy=strategy,
            spec=spec,
            transform=strategy.transform(run.strategy, spec, run.data.max_length),
            collate=strategy.collate(run.strategy, spec, self.draft),
            share=Share(self.world.rank, self.world.size, run.train.seed),
            batch_size=run.train.batch_size,
            device=self.world.device,
        )
        stream = batches.micro_batches(self.feed.source, self.position)
        return Prefetcher(stream, run.capture.prefetch)

    def _optimizer_step(
        self, batches: Prefetcher[Micro], phases: Phases
    ) -> tuple[metrics.Sums, float]:
        config, ranks = self.run.train, self.world.size
        outputs: list[StepOutput] = []
        tokens = 0
        for number in range(config.accumulate):
            with phases.time("data"):
                micro = next(batches)
            self.position, tokens = micro.position, tokens + micro.num_tokens
            self.model.set_requires_gradient_sync(number == config.accumulate - 1)
            with phases.time("forward"):
                output = self._forward(micro)
            with phases.time("backward"):
                torch.autograd.backward(output.loss_sum)
            outputs.append(output)
        with phases.time("optimizer"):
            spent = time.monotonic() - self.began if self.world.main else 0.0  # rank 0's clock
            gradients = local_gradients(self.draft.model)
            extra = (float(tokens), float(self.stop_asked), spent, square_norm(gradients))
            sums, (told, stopping, spent, square) = self.reducer.reduce(outputs, extra)
            place = self._watch_time(self.step + 1, spent) - 1
            self.num_tokens += int(told)
            self.stopping = stopping > 0  # all ranks stop at the same step
            loss, weight = sums.values["loss"]
            if weight == 0:  # nothing supervised anywhere in this step
                return sums, 0.0
            # FSDP averaged over ranks; the loss is a sum over all of them, divided once
            norm = math.sqrt(square) * ranks / weight
            self._check_finite(loss, norm)
            clipping = min(1.0, config.max_grad_norm / (norm + 1e-6))
            torch._foreach_mul_(gradients, clipping * ranks / weight)
            factor = lr_factor(place, self.total_steps, config, self.schedule)
            set_learning_rate(self.optimizers, factor)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return sums, norm

    def _forward(self, micro: Micro) -> StepOutput:
        generator = torch.Generator()
        seed = (self.run.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        generator.manual_seed(seed % 2**63)
        context = StepContext(
            step=self.step,
            total_steps=self.total_steps,
            generator=generator,
            training=True,
            mesh=self.world.mesh,
        )
        hook = "specforge_train_step"
        with self.strategy.guard(hook):
            output = self.step_function(self.draft, micro.batch, context)
        self.strategy.check_returned(hook, output, StepOutput, "StepOutput")
        metrics.check_scalars(f"{self.strategy.package}, {hook}", output)
        if micro.num_samples:
            return output
        nothing = {n: Ratio(num=r.num * 0, den=r.den * 0) for n, r in output.metrics.items()}
        return StepOutput(loss_sum=output.loss_sum * 0, weight=output.weight * 0, metrics=nothing)

    def _check_finite(self, loss: float, norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise RunError(
                    f"the {name} of step {self.step + 1} is {value}. Start again from the last "
                    "checkpoint with a lower train.learning_rate, or check the capture: "
                    "specforge verify CAPTURE_DIR"
                )

    def _log(self, window: metrics.Sums, norm: float, rate: float, phases: Phases) -> None:
        values = window.ratios() | {
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": float(self.num_tokens),
            "seconds": self.seconds,
            "tokens_per_second": rate,
        }
        values |= {f"seconds_{name}": spent for name, spent in phases.seconds.items()}
        phases.seconds.clear()
        self.trackers.log(self.step, values)

    def _info(self) -> dict[str, object]:
        """Return what trackers are told of the run."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "strategy": self.strategy.name,
            "target": self.run.target.path,
            "output_dir": str(self.run.output_dir),
            "config": self.run.model_dump(mode="json"),
            "versions": _versions(self.strategy),
        }

    def _save(self) -> Path:
        state = TrainState(
            step=self.step,
            total_steps=self.total_steps,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            strategy=self.strategy.name,
            position=self.position,
            config=self.run.model_dump(mode="json"),
            versions=_versions(self.strategy),
            machine=asdict(self.machine),
            identity=self.feed.identity.model_dump(mode="json"),
        )
        saved = checkpoint.save(
            self.run.output_dir, self.draft, self.optimizers, state, self.run.train.keep
        )
        self.trackers.event("checkpoint", step=self.step, path=str(saved))
        return saved


def _versions(strategy: Strategy) -> dict[str, str]:
    names = ("specforge-core", "torch", "transformers")
    return {name: version(name) for name in names} | {"strategy": strategy.package}
