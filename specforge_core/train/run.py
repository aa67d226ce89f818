"""Set a training run up, run its loop, and take it apart."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial

import torch

from .. import stop
from ..batches.loader import Share
from ..config import RunConfig, TrainConfig
from ..cpu import DTYPES
from ..devices import pick_device
from ..drafts.load import first_draft
from ..errors import ConfigError
from ..process import describe, report
from ..progress import console
from ..strategy import Strategy
from .claim import claim
from .compile import compile_units
from .dist import World, world
from .feed import Feed, open_feed
from .fsdp import shard
from .machine import Machine, choose
from .metrics import Reducer, Trackers
from .optim import remember_peaks
from .report import TrainReport
from .trainer import Trainer


def train(run: RunConfig, strategy: Strategy) -> TrainReport:
    """Train a draft as the config says; resumes from `output_dir` by itself."""
    config = run.train
    device = pick_device(config.device, "train.device")
    machine = choose(run)
    with ExitStack() as stack:
        world_ = stack.enter_context(world(device))
        try:
            if world_.main:
                stack.enter_context(claim(run.output_dir))
                console.print(f"training on {machine}", markup=False)
            feed = open_feed(run, strategy, Share(world_.rank, world_.size, config.seed))
            stack.callback(feed.close)
            trainer = _build(run, strategy, world_, feed, machine)
            stack.callback(trainer.trackers.close)
            trainer.resume()
            with stop.listening():
                return trainer.loop()
        except Exception as exc:
            # before anything is closed: that may wait for the other ranks, in vain
            report(*describe(exc))
            raise


def _build(
    run: RunConfig, strategy: Strategy, world_: World, feed: Feed, machine: Machine
) -> Trainer:
    config = run.train
    torch.manual_seed(config.seed)
    draft = first_draft(
        run,
        strategy,
        feed.target,
        feed.data,
        feed.identity,
        partial(console.print if world_.main else _nothing, markup=False),
    )
    dtype = DTYPES[machine.compute_dtype]
    draft.model.to(world_.device, torch.float32).train()
    if draft.frozen is not None:
        draft.frozen.to(world_.device, dtype).requires_grad_(False)
    if config.compile == "always" or (config.compile == "auto" and world_.device.type == "cuda"):
        compile_units(draft.compiled)
    model = shard(draft, world_.mesh, dtype)
    optimizers = strategy.optimizers(config, draft)
    remember_peaks(optimizers)
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
        trackers=Trackers(strategy.trackers(run) if world_.main else []),
        total_steps=count_steps(config, feed.data.num_samples, world_.size),
    )


def _nothing(line: str, *, markup: bool) -> None:
    """Say nothing, as ranks but the first do."""


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
