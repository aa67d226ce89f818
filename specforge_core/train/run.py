"""Set a training run up, run its loop, and take it apart."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from .. import stop
from ..claim import claim
from ..compiled import compile_units, recompute_units
from ..config import RunConfig
from ..cpu import DTYPES, agree_on_bfloat16
from ..devices import pick_device
from ..drafts.links import odd_links
from ..drafts.load import first_draft
from ..float8 import in_words, to_float8
from ..process import command_seconds, describe, report
from ..strategy import Strategy
from .acceptance import Acceptance
from .bad_steps import BadSteps
from .best import Best
from .course import Course
from .dist import World, world
from .feed import Feed, open_feed, share_of
from .forward import Forward
from .fsdp import shard, shards_of
from .growth import Growth
from .log import Log, Phases
from .machine import Machine, choose
from .memory import too_little
from .metrics import Reducer, Trackers
from .milestones import Milestones
from .optim import check_kept, remember_peaks
from .report import TrainReport
from .trace import Trace
from .trainer import Trainer
from .update import Update
from .validation import Validation


def train(run: RunConfig, strategy: Strategy) -> TrainReport:
    """Train a draft as the config says; resumes from `output_dir` by itself."""
    config = run.train
    started = Phases(config.profile)  # of the first line of metrics
    if (imports := command_seconds()) is not None:
        started.seconds["imports"] = imports
    device = pick_device(config.device, "train.device")
    with ExitStack() as stack:
        with started.time("group"):
            world_ = stack.enter_context(world(device))
        try:
            if world_.size > 1:
                agree_on_bfloat16(world_.from_first)
            machine = choose(run)
            if world_.main:
                stack.enter_context(claim(run.output_dir))
                for line in odd_links(run.output_dir):
                    world_.say(line)
            world_.say(f"training on {machine}")
            share = share_of(run, world_.rank, world_.size)
            with started.time("source"):
                feed = open_feed(run, strategy, share)
            stack.callback(feed.close)
            started.seconds["source"] -= feed.loading
            started.seconds["target"] = feed.loading
            with started.time("draft"):
                trainer = build(run, strategy, world_, feed, machine)
            trainer.log.phases = started
            stack.callback(trainer.trackers.close)
            stack.callback(trainer.trace.close)
            if trainer.growth is not None:
                stack.callback(trainer.growth.close)
            if trainer.milestones.acceptance is not None:
                stack.callback(trainer.milestones.acceptance.close)
            try:
                with started.time("draft"):
                    trainer.resume()
                with stop.listening():
                    return trainer.loop()
            except torch.OutOfMemoryError as exc:
                on = (trainer.draft, trainer.optimizers, feed.engine, world_.device)
                raise too_little(exc, run, *on) from exc
        except Exception as exc:
            # before anything is closed: that may wait for the other ranks, in vain
            report(*describe(exc))
            raise


def build(
    run: RunConfig, strategy: Strategy, world_: World, feed: Feed, machine: Machine
) -> Trainer:
    """Return a run's trainer at its first step: nothing is read from or written to output_dir."""
    config = run.train
    torch.manual_seed(config.seed)
    draft = first_draft(run, strategy, feed.target, feed.data, feed.identity, world_.say)
    dtype = DTYPES[machine.compute_dtype]
    draft.model.to(world_.device, torch.float32).train()
    if draft.frozen is not None:
        draft.frozen.to(world_.device, dtype).requires_grad_(False)
    if config.precision == "fp8":
        to_float8(draft, world_.device)
    if config.compile == "always" or (config.compile == "auto" and world_.device.type == "cuda"):
        compile_units(draft.compiled, inner=config.recompute)
    if config.recompute:
        recompute_units(draft.compiled)
    mesh = shards_of(world_.mesh, config.shard_size)
    replicas = world_.size // mesh.size(mesh.ndim - 1)
    model = shard(draft, mesh, dtype)
    optimizers = strategy.optimizers(config, draft)
    check_kept(optimizers, config)
    remember_peaks(optimizers)
    schedule = strategy.schedule(config)
    forward = Forward(run, strategy, strategy.train_step(run.strategy), draft, world_)
    if config.precision == "fp8":
        with strategy.guard("specforge_train_step"):
            world_.say(in_words(draft, forward.step_function))
    trackers = Trackers(strategy.trackers(run) if world_.main else [])
    validation = None
    if feed.held_out is not None:
        own = Reducer(strategy.package, world_.device)  # its metrics may be others
        validation = Validation(forward, feed.spec, feed.held_out, own)
    acceptance = Acceptance.open(run, strategy, world_, feed, draft)
    return Trainer(
        run=run,
        strategy=strategy,
        world=world_,
        machine=machine,
        feed=feed,
        draft=draft,
        model=model,
        optimizers=optimizers,
        schedule=schedule,
        forward=forward,
        reducer=Reducer(strategy.package, world_.device),
        update=Update(optimizers, config.max_grad_norm, world_.size, replicas),
        trackers=trackers,
        log=Log(config.log_every, trackers if world_.main else None, Phases(config.profile)),
        bad_steps=BadSteps(world_, trackers, config.max_bad_steps),
        milestones=Milestones(run, world_, trackers, validation, acceptance, Best.of(config)),
        growth=Growth.open(run, strategy, world_, feed),
        trace=Trace(config.trace_steps if world_.main else None, run.output_dir, world_.device),
        course=Course.of(
            *(config, feed.data.num_samples, world_.size, steps_ahead(world_.device)),
            num_tokens=feed.num_tokens,
        ),
    )


def steps_ahead(device: torch.device) -> int:
    """Return how many steps are launched before the numbers of one are read.

    A GPU works behind the host's back: with one step more to do it never runs dry.
    """
    return 1 if device.type == "cuda" else 0
