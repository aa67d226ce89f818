"""The training loop: the same for every strategy, data source and number of ranks."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from .. import stop
from ..batches.loader import Micro
from ..batches.prefetch import Prefetcher
from ..config import RunConfig
from ..drafts.checkpoint import TrainState, checkpoints, find, read_state, remove_incomplete
from ..drafts.identity import resolved
from ..progress import track
from ..records import recorded
from ..strategy import Strategy
from ..types import Draft, StepOutput
from . import checkpoint, metrics
from .bad_steps import BadSteps
from .course import Course
from .dist import World
from .feed import Feed
from .forward import Forward
from .growth import Growth
from .log import Log
from .machine import Machine
from .milestones import Milestones
from .optim import local_gradients, lr_factor, set_learning_rate, square_norm
from .report import Launched, TrainReport, computed_with, run_info
from .resume import check_resumed, data_change, learning_rate_change
from .supply import Supply
from .trace import Trace
from .update import Update, grad_norm

CLOSE_SECONDS = 1.0  # that a stopped run waits for the batches that are being made


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
    forward: Forward
    reducer: metrics.Reducer
    update: Update
    trackers: metrics.Trackers
    log: Log
    course: Course
    bad_steps: BadSteps
    milestones: Milestones
    growth: Growth | None  # where the data grows
    trace: Trace
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    position: int = 0  # samples of the endless sequence of epochs, of all ranks
    stopping: bool = False  # as all ranks agreed
    began: float = 0.0  # when training would have begun, had it never been interrupted

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of this output directory, if any."""
        if self.world.main:
            for path in remove_incomplete(self.run.output_dir):
                self.world.say(f"{path} has no state.json: no checkpoint, it is removed")
        if not (found := checkpoints(self.run.output_dir)):
            return
        state = read_state(found[-1])
        check_resumed(found[-1], state, self.run, self.strategy, self.draft, self.feed)
        checkpoint.load(found[-1], self.draft, self.optimizers)
        self.step, self.num_tokens, self.seconds = state.step, state.num_tokens, state.seconds
        self.position, self.log.tokens = state.position, state.num_tokens
        if self.growth is not None and state.grown is not None:
            self.growth.resume(state.grown)
        self.course.resume(self.step, self.position, self.seconds)
        self.log.logged, self.log.window = self.step, metrics.Sums(dict(state.window))
        self.milestones.resume(self.step, ended=self._ended())
        if state.logged is not None and not self._ended():
            self.log.logged = state.logged
        self.world.say(f"resuming at step {self.step} from {found[-1]}")
        schedule = learning_rate_change(state, self.run.train, self.course, self.strategy)
        for change in filter(None, (data_change(state, self.run), schedule)):
            self.world.say(change)

    def loop(self) -> TrainReport:
        """Train to the last step or a signal, and save; Interrupted where there is no step yet."""
        config = self.run.train
        info = (self.run, self.strategy, self.feed, self.course, self.step, self.log.logged)
        self.trackers.start(run_info(*info))
        self.milestones.again(self.step, self.course.total_steps)
        self.log.since = time.monotonic()
        self.began = self.log.since - self.seconds
        self._grow()
        supply = Supply(self._batches(), self.world, self.feed.captures_on(self.world.device))
        launched: deque[Launched] = deque()
        begun = saved = self.step
        label, steps = f"training {self.strategy.name}", self.course.total_steps
        shown = track(label, steps, quiet=not self.world.main, ends=True)
        try:
            with ExitStack() as held, shown as progress:
                progress.skip(self.step)
                if config.max_minutes is not None:
                    progress.deadline = self.course.deadline(self.began)
                while not self._ended() and (one := self._optimizer_step(supply)) is not None:
                    launched.append(one)
                    if self.step == begun:  # until now there was nothing to keep
                        held.enter_context(stop.keeping())
                    self.step += 1
                    self.trace.step(self.step)
                    self.seconds = time.monotonic() - self.began
                    save = self.step % config.save_every == 0
                    grows = self.growth is not None and self.growth.due(self.step, self.position)
                    due = save or grows or self.milestones.due(self.step)
                    while launched and (len(launched) > self.course.lag or due or self._ended()):
                        self._settle(launched)
                    progress.advance(1, self.log.note(self.num_tokens))
                    good = self.step == one.step and not self.bad_steps.in_a_row
                    if grows and self.step == one.step and self._grow():
                        supply.renew(self._batches)
                    # the last step is saved first: whatever measures it may take long, or fail
                    if due and good and not self._complete() and (self._measure() or save):
                        self._save()
                        saved = self.step
                while launched:
                    self._settle(launched)
                if self.step > begun:
                    self.log.rest(self.step)
                if not self.stopping:
                    self.bad_steps.check_last(self.step)
                if saved != self.step:
                    self._save()
                finished = self._complete()
                if not self.stopping:
                    if self.step not in (begun, self.milestones.measured):
                        self._measure()
                    self.milestones.finish(self.step)
        finally:
            self.feed.stop()
            if self.growth is not None:
                self.growth.close()  # a batch of answers may hold up the next batch
            supply.close(CLOSE_SECONDS if stop.asked() is not None else math.inf)
        return self._report(finished)

    def _report(self, finished: bool) -> TrainReport:
        if self.step == 0:
            raise stop.Interrupted(stop.asked() or signal.SIGTERM, "no step was done")
        return TrainReport(
            step=self.step,
            total_steps=self.course.total_steps,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            checkpoint=find(self.run.output_dir),
            finished=finished,
        )

    def _ended(self) -> bool:
        return self.stopping or self._complete()

    def _complete(self) -> bool:
        return self.step >= self.course.total_steps or self.course.time_up or self.milestones.over

    def _measure(self) -> bool:
        """Measure what is due after this step; say whether it has to be saved."""
        before = self.milestones.seconds
        save = self.milestones.reach(self.step, self.course.total_steps, last=self._complete())
        self.stopping |= self.milestones.stopped  # with the weights that are to be measured
        self.log.since += self.milestones.seconds - before  # a rate is of training alone
        return save

    def _batches(self) -> Prefetcher[Micro]:
        if self.growth is not None:
            stream = self.growth.micro_batches(self.forward, self.position)
        else:
            batches = self.forward.batches(self.feed.spec, self.course.length)
            stream = batches.micro_batches(self.feed.source, self.position)
        return Prefetcher(stream, self.run.capture.prefetch, self.world.device)

    def _grow(self) -> bool:
        """Ask for the answers that are due after this step; say whether another epoch begins."""
        if self.growth is None or self._ended():
            return False
        before = time.monotonic()
        begun = self.growth.after(self.step, self.position, self.course.deadline(self.began))
        self.course.time_up |= self.growth.late
        self.stopping |= begun is None and not self.growth.late
        self.log.since += time.monotonic() - before  # a rate is of training alone
        return bool(begun)

    def _optimizer_step(self, supply: Supply) -> Launched | None:
        """Launch one step; None where a signal came before this process's own data.

        On a GPU the host waits for nothing, if all optimizers allow it.
        """
        config, phases = self.run.train, self.log.phases
        outputs: list[StepOutput] = []
        tokens, before, indices = 0, self.position, tuple[int, ...]()
        place = self.course.place(self.step, self.position)
        for number in range(config.accumulate):
            with phases.time("data"):
                micro = supply.next()
            if micro is None:
                self.position = before
                return None
            self.position, tokens = micro.position, tokens + micro.num_tokens
            indices += micro.indices
            self.model.set_requires_gradient_sync(number == config.accumulate - 1)
            with phases.time("forward"):
                output = self._forward(micro, self.course.progress(place))
            with phases.time("backward"):
                torch.autograd.backward(output.loss_sum)
            outputs.append(output)
        with phases.time("optimizer"):
            spent = time.monotonic() - self.began if self.world.main else 0.0  # rank 0's clock
            gradients = local_gradients(self.draft.model)
            # a rank without data has the step left out, on the device
            counted = math.nan if supply.short else 1 / self.update.replicas
            square = square_norm(gradients, self.strategy.package) * counted
            flags = (float(stop.asked() is not None), float(supply.short))
            extra = (float(tokens), *flags, spent, square)
            reduced = self.reducer.reduce(outputs, extra)
            set_learning_rate(
                self.optimizers, lr_factor(place, self.course.span, config, self.schedule)
            )
            self.update.apply(gradients, reduced)
        self.course.go_on(self.step + 1, self.position)
        rate = self.optimizers[0].param_groups[0]["lr"]
        return Launched(self.step + 1, reduced, rate, indices, before)

    def _settle(self, queue: deque[Launched]) -> None:
        """Read what came of the first step of a queue, and log it."""
        launched = queue.popleft()
        sums, (tokens, stopping, short, spent, square) = launched.reduced.read()
        self.stopping = self.stopping or stopping > 0  # all ranks stop at the same step
        if short:  # no step from here on was done
            self.step, self.position = launched.step - 1, launched.before
            queue.clear()
            return
        self.num_tokens += int(tokens)
        self.course.watch(launched.step, spent)
        loss, weight = sums.values["loss"]
        norm = grad_norm(square, weight, self.world.size)
        values = {"learning_rate": launched.learning_rate, "grad_norm": norm}
        values |= {"tokens": float(self.num_tokens), "seconds": self.seconds}
        values["tokens_per_second"] = self.log.rate(self.num_tokens)
        if math.isfinite(loss) and math.isfinite(weight) and math.isfinite(norm):
            self.bad_steps.in_a_row = 0
            self.log.window.merge(sums)
        else:
            del values["grad_norm"]
            self.bad_steps.leave_out(launched, loss, norm)
        self.log.line(launched.step, values)

    def _forward(self, micro: Micro, progress: float) -> StepOutput:
        return self.forward(
            micro, self.forward.context(self.step, self.course.total_steps, progress)
        )

    def _save(self) -> Path:
        state = TrainState(
            step=self.step,
            total_steps=self.course.total_steps,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            strategy=self.strategy.name,
            position=self.position,
            config=recorded(self.run),
            versions=computed_with(self.strategy),
            machine=asdict(self.machine),
            identity=self.feed.identity,
            resolved=resolved(self.draft),
            length=self.course.length,
            first_window=self.feed.first_window,
            logged=self.log.logged,
            window=dict(self.log.window.values),
            grown=None if self.growth is None else self.growth.state(),
        )
        saved = checkpoint.save(
            self.run.output_dir, self.draft, self.optimizers, state, self.milestones.kept
        )
        self.trackers.event("checkpoint", step=self.step, path=str(saved))
        self.milestones.saved(self.step)
        return saved
