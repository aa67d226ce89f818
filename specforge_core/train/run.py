"""Set a training run up, run its loop, and take it apart."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch

from ..batches.loader import Share
from ..config import RunConfig
from ..cpu import DTYPES
from ..devices import pick_device
from ..drafts.load import first_draft
from ..progress import console
from ..strategy import Strategy
from .claim import ORPHANED, claim, end_with_launcher
from .course import Course
from .dist import World, world
from .feed import Feed, open_feed
from .fsdp import shard
from .log import Log, Phases
from .machine import Machine, choose
from .metrics import Reducer, Trackers
from .optim import remember_peaks
from .trainer import Trainer, TrainReport
from .update import Update


def train(run: RunConfig, strategy: Strategy) -> TrainReport:
    """Train a draft as the config says; resumes from `output_dir` by itself."""
    config = run.train
    device = pick_device(config.device, "train.device")
    machine = choose(run)
    end_with_launcher()
    with ExitStack() as stack:
        world_ = stack.enter_context(world(device))
        if world_.main:
            stack.enter_context(claim(run.output_dir))
            console.print(f"training on {machine}", markup=False)
        feed = open_feed(run, strategy, Share(world_.rank, world_.size, config.seed))
        stack.callback(feed.close)
        trainer = _build(run, strategy, world_, feed, machine)
        stack.callback(trainer.trackers.close)
        trainer.resume()
        with _stop_on_signal(trainer):
            return trainer.loop()


def _build(
    run: RunConfig, strategy: Strategy, world_: World, feed: Feed, machine: Machine
) -> Trainer:
    config = run.train
    torch.manual_seed(config.seed)
    draft = first_draft(run, strategy, feed.target, feed.data)
    dtype = DTYPES[machine.compute_dtype]
    draft.model.to(world_.device, torch.float32).train()
    if draft.frozen is not None:
        draft.frozen.to(world_.device, dtype).requires_grad_(False)
    if config.compile == "always" or (config.compile == "auto" and world_.device.type == "cuda"):
        for unit in draft.compiled:
            unit.compile()  # the second length makes it compile once more, for all lengths
    model = shard(draft, world_.mesh, dtype)
    optimizers = strategy.optimizers(config, draft)
    remember_peaks(optimizers)
    trackers = Trackers(strategy.trackers(run) if world_.main else [])
    return Trainer(
        run=run,
        strategy=strategy,
        world=world_,
        machine=machine,
        feed=feed,
        draft=draft,
        model=model,
        optimizers=optimizers,
        schedule=strategy.schedule(config),
        step_function=strategy.train_step(run.strategy),
        reducer=Reducer(strategy.package, world_.device),
        update=Update(optimizers, config.max_grad_norm, world_.size),
        trackers=trackers,
        log=Log(config.log_every, trackers if world_.main else None, Phases(config.profile)),
        course=Course.of(config, feed.data.num_samples, world_.size, steps_ahead(world_.device)),
    )


def steps_ahead(device: torch.device) -> int:
    """Return how many steps are launched before the numbers of one are read.

    A GPU works behind the host's back: with one step more to do it never runs dry.
    """
    return 1 if device.type == "cuda" else 0


@contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """On SIGTERM or Ctrl-C finish the step, save and leave the loop; the second time at once."""

    def stop(signum: int, frame: FrameType | None) -> None:
        if trainer.stop_asked and signum != ORPHANED:
            raise KeyboardInterrupt
        trainer.stop_asked = True

    signals = (signal.SIGTERM, signal.SIGINT, ORPHANED)
    old = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
