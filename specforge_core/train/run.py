"""Set a training run up, run its loop, and take it apart."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch

from ..config import RunConfig, TrainConfig
from ..cpu import DTYPES
from ..data.loader import Share
from ..errors import ConfigError
from ..progress import console
from ..strategy import Strategy
from .claim import ORPHANED, claim, end_with_launcher
from .dist import World, pick_device, world
from .feed import Feed, open_feed
from .fsdp import shard
from .initial import first_draft
from .machine import Machine, choose
from .optim import build_optimizers
from .trainer import Trainer, TrainReport


def train(run: RunConfig, strategy: Strategy) -> TrainReport:
    """Train a draft as the config says; resumes from `output_dir` by itself."""
    config = run.train
    device = pick_device(config.device)
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
        trainer.resume()
        with _stop_on_signal(trainer):
            return trainer.loop()


def _build(
    run: RunConfig, strategy: Strategy, world_: World, feed: Feed, machine: Machine
) -> Trainer:
    config = run.train
    torch.manual_seed(config.seed)
    draft = first_draft(run, strategy, feed)
    dtype = DTYPES[machine.compute_dtype]
    draft.model.to(world_.device, torch.float32).train()
    if draft.frozen is not None:
        draft.frozen.to(world_.device, dtype).requires_grad_(False)
    if config.compile == "always" or (config.compile == "auto" and world_.device.type == "cuda"):
        for unit in (*draft.shard_units, *draft.repeated_units):
            unit.compile()  # the second length makes it compile once more, for all lengths
    return Trainer(
        run=run,
        strategy=strategy,
        world=world_,
        machine=machine,
        feed=feed,
        draft=draft,
        model=shard(draft, world_.mesh, dtype),
        optimizers=build_optimizers(draft, config),
        step_function=strategy.train_step(run.strategy),
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + world_.rank),
        total_steps=count_steps(config, feed.epoch_length, world_.size),
    )


def count_steps(config: TrainConfig, epoch_length: int | None, world_size: int) -> int:
    """Return the optimizer steps of a run over `epoch_length` samples."""
    if config.max_steps is not None:
        return config.max_steps
    if epoch_length is None:
        raise ConfigError(
            "the capture is still growing, so its epochs cannot be counted. "
            "Give the number of steps: train.max_steps=1000"
        )
    per_step = config.batch_size * config.accumulate * world_size
    return max(1, math.floor(config.epochs * epoch_length / per_step))


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
