"""The training loop: the same for every strategy, data source and number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ..config import RunConfig
from ..data.loader import Micro, micro_batches
from ..data.prefetch import Prefetcher
from ..errors import RunError
from ..progress import console, track
from ..strategy import Strategy
from ..types import Draft, StepContext, StepOutput, TrainStep
from . import checkpoint, metrics
from .checkpoint import TrainState, decode_generator, encode_generator
from .dist import World
from .feed import Feed
from .machine import Machine
from .optim import lr_factor, scale_gradients, set_learning_rate
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
    step_function: TrainStep
    generator: torch.Generator
    total_steps: int
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    position: int = 0
    stop_asked: bool = False  # of this rank, by a signal at any moment
    stopping: bool = False  # as all ranks agreed
    time_up: bool = False  # another step would end after train.max_minutes
    began: float = 0.0  # when training would have begun, had it never been interrupted

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of this output directory, if any."""
        found = checkpoint.checkpoints(self.run.output_dir)
        if not found:
            return
        state = checkpoint.read_state(found[-1])
        checkpoint.check_strategy(found[-1], state, self.strategy.name)
        check_optimizer(found[-1], state, self.run.train)
        checkpoint.load(found[-1], self.draft.model, self.optimizers)
        self.step, self.num_tokens, self.seconds = state.step, state.num_tokens, state.seconds
        self._watch_time(self.step, self.seconds)
        if state.world_size == self.world.size:
            self.position = state.positions[self.world.rank]
            self.generator.set_state(decode_generator(state.generators[self.world.rank]))
        else:  # another world size: go on where the slowest rank was; draws begin anew
            self.position = min(state.positions) * state.world_size // self.world.size
        if self.world.main:
            metrics.rewind(self.run.output_dir, self.step)
            console.print(f"resuming at step {self.step} from {found[-1]}", markup=False)
            if change := learning_rate_change(state, self.run.train, self.total_steps):
                console.print(change, markup=False)

    def loop(self) -> TrainReport:
        """Train until the last step or a signal to stop; save; say where."""
        config = self.run.train
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
            saved = checkpoint.find(self.run.output_dir)
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
        run, strategy, spec = self.run, self.strategy, self.feed.adapter.spec
        stream = micro_batches(
            self.feed.source,
            strategy.transform(run.strategy, spec, run.data.max_length, training=True),
            strategy.collate(run.strategy, spec),
            batch_size=run.train.batch_size,
            position=self.position,
            epoch_length=self.feed.epoch_length,
            device=self.world.device,
        )
        return Prefetcher(stream, run.capture.prefetch)

    def _optimizer_step(
        self, batches: Prefetcher[Micro], phases: Phases
    ) -> tuple[metrics.Sums, float]:
        config, world_ = self.run.train, self.world
        outputs: list[StepOutput] = []
        tokens = 0
        for number in range(config.accumulate):
            with phases.time("data"):
                micro = next(batches)
            self.position, tokens = micro.position, tokens + micro.num_tokens
            self.model.set_requires_gradient_sync(number == config.accumulate - 1)
            with phases.time("forward"):
                context = StepContext(self.step, self.total_steps, self.generator)
                output = self.step_function(self.draft, micro.batch, context)
            with phases.time("backward"):
                torch.autograd.backward(output.loss_sum)
            outputs.append(output)
        with phases.time("optimizer"):
            spent = time.monotonic() - self.began if world_.main else 0.0  # rank 0's clock counts
            counts = [tokens, int(self.stop_asked), int(1e3 * spent)]
            sums, (tokens, stopping, spent_ms) = metrics.reduce(outputs, counts, world_.device)
            place = self._watch_time(self.step + 1, spent_ms / 1e3) - 1
            self.num_tokens += tokens
            self.stopping = stopping > 0  # all ranks stop at the same step
            loss, weight = sums.values["loss"]
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of step {self.step + 1} is {loss}. Start again from the last "
                    "checkpoint with a lower train.learning_rate, or check the capture: "
                    "specforge verify CAPTURE_DIR"
                )
            if weight == 0:  # nothing supervised anywhere in this step
                return sums, 0.0
            # FSDP averaged over ranks; the loss is a sum over all of them, divided once
            scale_gradients(self.draft.model, world_.size / weight)
            norm = nn.utils.clip_grad_norm_(self.draft.model.parameters(), config.max_grad_norm)
            set_learning_rate(self.optimizers, lr_factor(place, self.total_steps, config))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return sums, float(full)

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
        self.strategy.step_finished(self.step, values, self.run.output_dir)

    def _save(self) -> Path:
        mine = (self.position, encode_generator(self.generator))
        everyone: list[tuple[int, str]] = [mine] * self.world.size
        dist.all_gather_object(everyone, mine)
        state = TrainState(
            step=self.step,
            total_steps=self.total_steps,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            strategy=self.strategy.name,
            world_size=self.world.size,
            positions=[position for position, _ in everyone],
            generators=[text for _, text in everyone],
            config=self.run.model_dump(mode="json"),
            versions=_versions(self.strategy),
            machine=asdict(self.machine),
            identity=self.feed.manifest.identity.model_dump(mode="json"),
        )
        return checkpoint.save(
            self.run.output_dir, self.draft.model, self.optimizers, state, self.run.train.keep
        )


def _versions(strategy: Strategy) -> dict[str, str]:
    names = ("specforge-core", "torch", "transformers")
    return {name: version(name) for name in names} | {"strategy": strategy.package}
