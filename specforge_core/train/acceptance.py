"""Real acceptance of the weights of one step: in this process, or in one beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .. import stop
from ..config import RunConfig
from ..devices import pick_device
from ..errors import ConfigError
from ..evaluate.beside import Beside, Outcome
from ..evaluate.live import GivenUp, Live
from ..evaluate.report import as_metrics
from ..evaluate.run import load_prompt_sets
from ..process import describe
from ..strategy import Strategy
from ..target.engine import TransformersEngine
from ..target.tokenizer import load_tokenizer
from ..types import Draft
from .dist import World
from .feed import Feed

# that ranks wait for the first one: NCCL ends them after 600, gloo after 1,800
MOST_SECONDS = {"cuda": 500.0, "cpu": 1500.0}
ROUND_SECONDS = 60.0  # after which all ranks hear that what runs beside still runs
POLL_SECONDS = 0.2  # between two looks whether a stop is asked for
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(slots=True)
class Acceptance:
    """Evaluations, which the first rank makes; all ranks learn what came of them."""

    world: World
    draft: Draft
    seconds: float  # that one may take
    inside: bool  # in this process, with the target of the training
    live: Live | None = None  # on the first rank
    beside: Beside | None = None  # on the first rank

    @classmethod
    def open(
        cls, run: RunConfig, strategy: Strategy, world: World, feed: Feed, draft: Draft
    ) -> Acceptance | None:
        """Return what `train.eval_every` asks for, if it does.

        Raises, on every rank, what is wrong with `eval.prompts` and where they are decoded.
        """
        if run.train.eval_every is None:
            return None
        sets = load_prompt_sets(run, strategy, load_tokenizer(run.target), feed.target)
        engine, lock = feed.engine, feed.lock
        if isinstance(engine, TransformersEngine) and run.eval.device is None:
            assert lock is not None
            _check_patience(run.train.eval_seconds, world)
            live = Live.open(run, strategy, engine, lock, sets) if world.main else None
            return cls(world, draft, run.train.eval_seconds, inside=True, live=live)
        beside = Beside(run, other_device(run, world.device), run.train.eval_seconds)
        found = cls(world, draft, run.train.eval_seconds, inside=False)
        found.beside = beside if world.main else None
        return found

    def now(self, step: int) -> list[Outcome]:
        """Measure the weights of this moment, or see what was found out beside.

        Called on all ranks at once; returns the same on all of them.
        """
        found: list[Outcome] = []
        if self.inside:
            whole = get_model_state_dict(self.draft.model, options=WHOLE)  # of all ranks' parts
            if self.live is not None:
                found = self._inside(self.live, step, whole)
        elif self.beside is not None and (outcome := self.beside.poll()) is not None:
            found = [outcome]
        return self.world.from_first(found)

    def rest(self) -> list[Outcome]:
        """Wait for what is measured beside, no longer than it may take; on all ranks at once."""
        found: list[Outcome] = []
        while True:
            heard: list[Outcome] = []
            until = time.monotonic() + ROUND_SECONDS
            while self._runs() and not heard and time.monotonic() < until:
                outcome = self.beside.poll(POLL_SECONDS) if self.beside is not None else None
                heard += [outcome] if outcome is not None else []
            heard, goes_on = self.world.from_first((heard, self._runs()))
            found += heard
            if not goes_on:
                return found

    def _runs(self) -> bool:
        """Say whether something is measured beside that is still waited for."""
        return self.beside is not None and self.beside.step is not None and stop.asked() is None

    def begin(self, step: int, checkpoint: Path) -> str:
        """Measure a checkpoint beside; return why not, where the one before still runs."""
        if self.beside is None:
            return ""
        if self.beside.step is not None:
            return f"that of step {self.beside.step} still runs"
        self.beside.start(step, checkpoint)
        return ""

    @property
    def reading(self) -> frozenset[int]:
        """The step whose checkpoint is read beside, if one is."""
        step = None if self.beside is None else self.beside.step
        return frozenset() if step is None else frozenset({step})

    def close(self) -> None:
        """End what is measured beside."""
        if self.beside is not None:
            self.beside.close()

    def _inside(self, live: Live, step: int, whole: Mapping[str, Any]) -> list[Outcome]:
        began = time.monotonic()
        weights = {name: value for name, value in whole.items() if self.draft.saved(name)}

        def end() -> bool:
            return stop.asked() is not None or time.monotonic() - began > self.seconds

        try:
            report = live.measure(weights, end)
        except GivenUp:
            if stop.asked() is not None:
                return []
            return [Outcome.too_long(step, self.seconds)]
        except Exception as exc:  # the training does not need it
            return [Outcome(step, failure=describe(exc)[0])]
        seconds = {"eval/seconds": time.monotonic() - began}
        return [Outcome(step, as_metrics(report) | seconds)]


def _check_patience(seconds: float, world: World) -> None:
    """Raise ConfigError where the other ranks would give up before the first one does."""
    most = MOST_SECONDS["cuda" if world.device.type == "cuda" else "cpu"]
    if world.size > 1 and seconds > most:
        raise ConfigError(
            f"train.eval_seconds={seconds:g}: the other ranks wait no longer than {most:g} "
            f"seconds. Try: train.eval_seconds={most:g}, or eval.device=DEVICE, beside the training"
        )


def other_device(run: RunConfig, device: torch.device) -> str:
    """Return where evaluations beside a training on `device` run.

    Raises ConfigError where no device is left for them.
    """
    if (asked := run.eval.device) is not None:
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if asked not in gpus:  # to look at a GPU takes memory there
            pick_device(asked, "eval.device")
        return asked
    if device.type != "cuda":
        return "cpu"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    taken = {f"cuda:{n}" for n in range(ranks)} if ranks > 1 else {f"cuda:{device.index or 0}"}
    if run.data.capture_dir is None:
        taken.add(run.target.device)
    for number in range(torch.cuda.device_count()):
        if f"cuda:{number}" not in taken:
            return f"cuda:{number}"
    raise ConfigError(
        "train.eval_every needs a device for evaluations, since the target is not in the process "
        f"of the training, and all {ranks} GPU(s) train. Try: eval.device=cuda:0 (which they "
        "share), or eval.device=cpu"
    )
