"""The training loop: the same for every strategy, data source and number of ranks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
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
from .course import Course
from .dist import World
from .feed import Feed
from .log import Log
from .machine import Machine
from .optim import local_gradients, lr_factor, set_learning_rate, square_norm
from .resume import check_optimizer, learning_rate_change
from .update import Update, grad_norm


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished (or stopped) run reached."""

    step: int
    total_steps: int
    num_tokens: int
    seconds: float
    checkpoint: Path
    finished: bool  # the schedule came to its end, by steps or by time


@dataclass(frozen=True, slots=True)
class Launched:
    """One optimizer step that the device was given; what came of it is read later."""

    step: int  # from 1
    reduced: metrics.Reduced
    learning_rate: float
    indices: tuple[int, ...]  # of this rank's samples


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
    update: Update
    trackers: metrics.Trackers
    log: Log
    course: Course
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0  # left out in a row
    position: int = 0  # samples of the endless sequence of epochs, of all ranks
    stop_asked: bool = False  # of this rank, by a signal at any moment
    stopping: bool = False  # as all ranks agreed
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
        self.position = state.position
        self.course.resume(self.step, self.position, self.seconds)
        self.log.tokens = self.num_tokens
        self.log.logged, self.log.window = self.step, metrics.Sums(dict(state.window))
        if state.logged is not None and not self._ended():
            self.log.logged = state.logged
        if self.world.main:
            console.print(f"resuming at step {self.step} from {found[-1]}", markup=False)
            change = learning_rate_change(state, self.run.train, self.course, self.strategy)
            if change is not None:
                console.print(change, markup=False)

    def loop(self) -> TrainReport:
        """Train until the last step or a signal to stop; save; say where."""
        config = self.run.train
        self.trackers.start(self._info())
        batches = self._batches()
        launched: deque[Launched] = deque()
        self.log.since = time.monotonic()
        self.began = self.log.since - self.seconds
        saved = None
        label = f"training {self.strategy.name}"
        try:
            with track(label, self.course.total_steps, quiet=not self.world.main) as progress:
                progress.skip(self.step)
                if config.max_minutes is not None:
                    progress.deadline = self.began + 60 * config.max_minutes
                while not self._ended():
                    launched.append(self._optimizer_step(batches))
                    self.step += 1
                    self.seconds = time.monotonic() - self.began
                    due = self.step % config.save_every == 0
                    while launched and (len(launched) > self.course.lag or due or self._ended()):
                        self._settle(launched.popleft())
                    rate = self.log.rate(self.num_tokens)
                    progress.advance(1, f"loss {self.log.loss:.3f}  {rate:,.0f} tokens/s")
                    if (due or self._ended()) and not self.bad_steps:
                        saved = self._save()
        finally:
            batches.close()
        if self.bad_steps:
            raise RunError(
                f"step {self.step}, the last one, was left out (see above), so nothing was saved "
                "after it. Start again from the last checkpoint with a lower train.learning_rate"
            )
        if saved is None:  # resumed after the last step
            saved = find(self.run.output_dir)
        finished = self.step == self.course.total_steps or self.course.time_up
        return TrainReport(
            self.step, self.course.total_steps, self.num_tokens, self.seconds, saved, finished
        )

    def _ended(self) -> bool:
        return self.step >= self.course.total_steps or self.stopping or self.course.time_up

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
            end=self.course.length,
        )
        stream = batches.micro_batches(self.feed.source, self.position)
        return Prefetcher(stream, run.capture.prefetch)

    def _optimizer_step(self, batches: Prefetcher[Micro]) -> Launched:
        """Launch one step.  On a GPU the host waits for nothing, if all optimizers allow it."""
        config, phases = self.run.train, self.log.phases
        outputs: list[StepOutput] = []
        tokens, place = 0, self.course.place(self.step, self.position)
        indices: tuple[int, ...] = ()
        for number in range(config.accumulate):
            with phases.time("data"):
                micro = next(batches)
            self.position, tokens = micro.position, tokens + micro.num_tokens
            indices += micro.indices
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
            reduced = self.reducer.reduce(outputs, extra)
            set_learning_rate(
                self.optimizers, lr_factor(place, self.course.span, config, self.schedule)
            )
            self.update.apply(gradients, reduced)
        rate = self.optimizers[0].param_groups[0]["lr"]
        return Launched(self.step + 1, reduced, rate, indices)

    def _settle(self, launched: Launched) -> None:
        """Read what came of a step, and log it."""
        sums, (tokens, stopping, spent, square) = launched.reduced.read()
        self.num_tokens += int(tokens)
        self.stopping = self.stopping or stopping > 0  # all ranks stop at the same step
        self.course.watch(launched.step, spent)
        loss, weight = sums.values["loss"]
        norm = grad_norm(square, weight, self.world.size)
        values = {"learning_rate": launched.learning_rate, "grad_norm": norm}
        values |= {"tokens": float(self.num_tokens), "seconds": self.seconds}
        values["tokens_per_second"] = self.log.rate(self.num_tokens)
        if math.isfinite(loss) and math.isfinite(weight) and math.isfinite(norm):
            self.bad_steps = 0
            self.log.window.merge(sums)
        else:
            del values["grad_norm"]
            self._leave_out(launched, loss, norm)
        last = launched.step == self.step and self._ended()
        self.log.line(launched.step, values, last=last)

    def _leave_out(self, launched: Launched, loss: float, norm: float) -> None:
        """Tell of a step that was not applied; RunError when there were too many in a row."""
        self.bad_steps += 1
        everyone: list[tuple[int, ...]] = [launched.indices] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(everyone, launched.indices)
        indices = sorted(index for part in everyone for index in part)
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        problem = f"the {what} of step {launched.step} is {value}"
        if self.world.main:
            console.print(
                f"warning: {problem}. The step was left out; its samples: "
                + ", ".join(map(str, indices)),
                markup=False,
            )
            self.trackers.event("bad_step", step=launched.step, samples=indices)
        allowed = self.run.train.max_bad_steps
        if self.bad_steps > allowed:
            raise RunError(
                f"{problem}, and train.max_bad_steps={allowed} such steps in a row are left out. "
                "Start again from the last checkpoint with a lower train.learning_rate, or check "
                "the capture: specforge verify CAPTURE_DIR"
            )

    def _forward(self, micro: Micro) -> StepOutput:
        generator = torch.Generator()
        generator.manual_seed(
            (self.run.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        )
        context = StepContext(
            step=self.step,
            total_steps=self.course.total_steps,
            generator=generator,
            training=True,
            mesh=self.world.mesh,
        )
        hook = "specforge_train_step"
        with self.strategy.guard(hook):
            output = self.step_function(self.draft, micro.batch, context)
        self.strategy.check_returned(hook, output, StepOutput, "StepOutput")
        if micro.num_samples:
            return output
        nothing = {n: Ratio(num=r.num * 0, den=r.den * 0) for n, r in output.metrics.items()}
        return StepOutput(loss_sum=output.loss_sum * 0, weight=output.weight * 0, metrics=nothing)

    def _info(self) -> dict[str, object]:
        """Return what trackers are told of the run."""
        return {
            "step": self.step,
            "logged": self.log.logged,
            "total_steps": self.course.total_steps,
            "strategy": self.strategy.name,
            "target": self.run.target.path,
            "output_dir": str(self.run.output_dir),
            "config": self.run.model_dump(mode="json"),
            "versions": _versions(self.strategy),
        }

    def _save(self) -> Path:
        state = TrainState(
            step=self.step,
            total_steps=self.course.total_steps,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            strategy=self.strategy.name,
            position=self.position,
            config=self.run.model_dump(mode="json"),
            versions=_versions(self.strategy),
            machine=asdict(self.machine),
            identity=self.feed.identity.model_dump(mode="json"),
            length=self.course.length,
            logged=self.log.logged,
            window=dict(self.log.window.values),
        )
        saved = checkpoint.save(
            self.run.output_dir, self.draft, self.optimizers, state, self.run.train.keep
        )
        self.trackers.event("checkpoint", step=self.step, path=str(saved))
        return saved


def _versions(strategy: Strategy) -> dict[str, str]:
    names = ("specforge-core", "torch", "transformers")
    return {name: version(name) for name in names} | {"strategy": strategy.package}
