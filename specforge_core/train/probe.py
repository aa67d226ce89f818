"""The rate of a training, by a few of its steps: nothing is written but `data.cache`."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import stop
from ..capture.estimate import Size, peak_memory
from ..config import RunConfig
from ..cpu import DTYPES
from ..devices import pick_device
from ..errors import SpecForgeError
from ..process import describe
from ..strategy import Strategy
from ..text import in_time, in_units
from ..types import Planned
from .course import Course
from .dist import world
from .feed import open_feed, share_of
from .machine import choose
from .memory import estimate
from .run import build
from .supply import Supply
from .trainer import CLOSE_SECONDS, Trainer

FORMATS = ("hf", "sglang", "vllm")  # which every method may know
STEPS = 3  # that are measured, after one that is not


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a few steps of one process came to."""

    data_seconds: float  # of a step's samples: read, or captured from the target
    step_seconds: float  # of the step itself
    tokens: float  # of a step
    memory: dict[str, str]
    at_most: dict[str, int]  # bytes that a rank will hold with the longest samples, by what for
    checkpoint_bytes: int
    size: Size
    samples: int | None  # of an epoch; None while the capture grows
    total_tokens: int | None  # likewise
    exports: dict[str, str]  # format -> whether the draft can be written in it, or why not

    def as_plan(self, run: RunConfig, nproc: int) -> dict[str, object]:
        """Return what a plan says of the whole run, on `nproc` processes that are as fast each."""
        course = Course.of(run.train, self.samples, nproc, 0, self.total_tokens)
        seconds = self.data_seconds + self.step_seconds
        whole = course.total_steps * seconds
        if run.train.max_minutes is not None:
            whole = min(whole, run.train.max_minutes * 60)
        stored = "not known while the capture grows"
        if self.samples is not None and self.total_tokens is not None:
            stored = in_units(self.size.total(self.samples, self.total_tokens))
        return {
            "measured_on": f"{STEPS} steps of one process",
            "steps": course.total_steps,
            "time": in_time(whole),  # data and steps overlap: at most
            "seconds_per_step": {
                "data": round(self.data_seconds, 4),
                "training": round(self.step_seconds, 4),
            },
            "tokens_per_second": round(nproc * self.tokens / max(seconds, 1e-9), 1),
            "memory": self.memory,
            "memory_at_most": {
                "of_draft_and_step": in_units(sum(self.at_most.values())),
                **{name: in_units(size) for name, size in self.at_most.items() if size},
            },
            "checkpoint": in_units(self.checkpoint_bytes),
            "exports": self.exports,
            "captured_states": {
                "bytes_per_token": self.size.per_token,
                "tokens": self.total_tokens,
                "total": stored,
            },
        }


def probe(run: RunConfig, strategy: Strategy, nproc: int = 1) -> Probe:
    """Do the first steps of a run in this process and forget them; it is to have `nproc`.

    Raises what `train` does for a run that cannot begin.
    """
    device = pick_device(run.train.device, "train.device")
    machine = choose(run)
    # what is measured is the target, and what a run has kept of it stays as it is
    run = run.model_copy(update={"capture": run.capture.model_copy(update={"cache": None})})
    alone = run.model_copy(update={"train": run.train.model_copy(update={"shard_size": None})})
    with ExitStack() as stack:
        world_ = stack.enter_context(world(device))
        share = share_of(run, world_.rank, world_.size)
        feed = open_feed(run, strategy, share, whole=True)
        stack.callback(feed.close)
        trainer = build(alone, strategy, world_, feed, machine)
        per_step = trainer.course.per_step
        # whole windows: the first sample of one waits for the target to run them all
        count = math.ceil(per_step / run.capture.window) * run.capture.window
        started = time.perf_counter()
        for _ in islice(feed.source.samples(0, count * world_.size), count):
            pass
        data = (time.perf_counter() - started) * per_step / count
        seconds, tokens = _steps(trainer)
        return Probe(
            data_seconds=data,
            step_seconds=seconds,
            tokens=tokens,
            memory=peak_memory(),
            at_most=_at_most(trainer, run, nproc),
            checkpoint_bytes=_checkpoint_bytes(trainer),
            size=Size.of(feed.spec),
            samples=feed.data.num_samples,
            total_tokens=feed.num_tokens,
            exports=_exports(trainer),
        )


def _at_most(trainer: Trainer, run: RunConfig, nproc: int) -> dict[str, int]:
    """Return what a rank will hold; of a method that does not say what a step does, the rest."""
    step, draft = trainer.forward.step_function, trainer.draft
    item = DTYPES[trainer.machine.compute_dtype].itemsize
    found = None
    if isinstance(step, Planned):
        samples = max(1, trainer.course.per_step // run.train.accumulate)
        tokens = run.train.batch_tokens or samples * run.data.max_length
        recompute = run.train.recompute
        with trainer.strategy.guard("specforge_train_step"):
            found = step.step_bytes(draft, tokens, samples, item, recompute=recompute)
    on = (trainer.optimizers, trainer.feed.engine)
    return estimate(draft, *on, found, run, nproc, item)


def _steps(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds and tokens of a step, without the wait for its data."""
    batches = trainer._batches()
    supply = Supply(batches, trainer.world)
    spent, tokens = 0.0, 0.0
    trainer.began = time.monotonic()
    try:
        for number in range(1 + STEPS):
            trainer.log.phases.seconds.clear()
            started = time.perf_counter()
            if (launched := trainer._optimizer_step(supply)) is None:
                raise stop.Interrupted(stop.asked() or 2, "nothing was written")
            _, told = launched.reduced.read()  # waits for the device
            trainer.step += 1
            if number:
                waited = trainer.log.phases.seconds["data"]
                spent += time.perf_counter() - started - waited
                tokens += told[0]
    finally:
        trainer.feed.source.close()
        batches.close(CLOSE_SECONDS)
    return spent / STEPS, tokens / STEPS


def _exports(trainer: Trainer) -> dict[str, str]:
    """Say of each format whether a draft of this run can be exported in it, or why not.

    What an export makes of the weights has shapes and dtypes, and no memory of its own; one that
    wants values is made once more as it is.
    """
    of = (trainer.run.strategy, trainer.draft, trainer.feed.target)
    found = {}
    for name in FORMATS:
        for kind in (partial(FakeTensorMode, allow_non_fake_inputs=True), nullcontext):
            try:
                with kind():
                    trainer.strategy.export(*of, name)
            except SpecForgeError as exc:
                found[name] = describe(exc)[0]
            else:
                found[name] = "yes"
                break
    return found


def _checkpoint_bytes(trainer: Trainer) -> int:
    """Return the bytes of a draft's saved weights and its optimizers' states."""
    draft = trainer.draft
    weights = [t for name, t in draft.model.state_dict().items() if draft.saved(name)]
    states = [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(t.numel() * torch.empty(0, dtype=t.dtype).itemsize for t in (*weights, *states))
