"""What a resumed run changes of the run before: refused, or said in one line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ..config import RunConfig, TrainConfig
from ..drafts.checkpoint import TrainState, check_strategy
from ..drafts.identity import Made, check_same
from ..errors import CheckpointError
from ..records import recorded
from ..strategy import Strategy
from ..text import shorten
from ..types import Draft
from .course import Course
from .feed import Feed
from .optim import lr_factor

# options that say what is trained on, and may change
DATA = ("train", "mix", "validation", "capture_dir", "limit", "max_length", "too_long")
NOTICED = 0.01  # a learning rate that moves less is not worth a line


def check_resumed(
    path: Path,
    state: TrainState,
    run: RunConfig,
    strategy: Strategy,
    draft: Draft,
    feed: Feed,
) -> None:
    """Raise CheckpointError when a run would go on with something else than it began with.

    That is all that made the draft, and what its training cannot go on without: the optimizer's
    state, and the order of the samples.
    """
    check_strategy(path, state.strategy, strategy.name)
    now = Made.of_run(run, strategy, draft, feed.identity)
    anew = f"start from its weights: train.init_from={path} output_dir=ANOTHER"
    check_same(path, Made.of_state(state), now, type(run.strategy), otherwise=anew)
    check_optimizer(path, state, run.train)
    seed = TrainConfig.model_validate(state.config["train"]).seed
    window = state.config["data"].get("shuffle_window")  # older checkpoints have none
    for key, before, value in (
        ("train.seed", seed, run.train.seed),
        ("data.shuffle_window", window, run.data.shuffle_window),
    ):
        if before != value:
            raise CheckpointError(
                f"{path} was trained with {key}={_shown(before)}, this run has {key}="
                f"{_shown(value)}: the order of the samples would be another, some would come "
                f"twice and some not at all. Try: {key}={_shown(before)}, or {anew}"
            )
    if state.first_window != feed.first_window:
        how = "its rows in a mixed order, as plain files of JSON lines are from 4 MB on"
        other = "rows in the order of their files"
        began, goes = (other, how) if state.first_window is None else (how, other)
        again = "data.limit=100000000" if state.first_window is None else "data.limit=null"
        raise CheckpointError(
            f"{path} was trained on {began}, this run reads {goes}: some would come twice and some "
            f"not at all. Try: {again} with the files as they were, or {anew}"
        )
    grew = state.config["train"].get("regenerate_every")
    every = run.train.regenerate_every
    if (state.grown is None) != (every is None):
        raise CheckpointError(
            f"{path} was trained with train.regenerate_every={_shown(grew)}, this run has "
            f"train.regenerate_every={_shown(every)}: its epochs would be others. Try: "
            f"train.regenerate_every={_shown(grew)}, or {anew}"
        )


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)


def check_optimizer(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Raise CheckpointError when a checkpoint holds the state of another optimizer."""
    own = TrainConfig.model_validate(state.config["train"])
    for key in ("optimizer", "optimizer_dtype"):
        before, now = getattr(own, key), getattr(config, key)
        if before != now:
            raise CheckpointError(
                f"{path} was trained with train.{key}={before}, this run has train.{key}={now}, "
                f"which has no state in it. Try: train.{key}={before}, or start from its weights: "
                f"train.init_from={path} output_dir=ANOTHER"
            )


def data_change(state: TrainState, run: RunConfig) -> str | None:
    """Return a line where another data is gone on with than was trained on, or None."""
    old, new = state.config["data"], recorded(run)["data"]
    said = [
        f"data.{key} was {shorten(old[key])} and is {shorten(new[key])}"
        for key in DATA
        if key in old and old[key] != new[key]  # older checkpoints do not have all
    ]
    if not said:
        return None
    return f"{'; '.join(said)}: the run goes on at the same place of the new data"


def learning_rate_change(
    state: TrainState, config: TrainConfig, course: Course, strategy: Strategy
) -> str | None:
    """Return a line where the schedule does not go on as it was, or None.

    Another train.max_steps stretches the schedule over all steps, so a run that had
    ended at its minimum is warmed up again: that may be meant, and is not what a plot expects.
    """
    if not 0 < state.step < course.total_steps:
        return None
    old = TrainConfig.model_validate(state.config["train"])
    then = replace(course, length=state.length, minutes=old.max_minutes)
    if state.length is None:
        then.total_steps = state.total_steps
    before, after = strategy.schedule(old), strategy.schedule(config)
    was, goes_on = (c.place(state.step, state.position) for c in (then, course))
    going_on = old.learning_rate * lr_factor(was, then.span, old, before)
    last = old.learning_rate * lr_factor(max(0, was - 1), then.span, old, before)
    now = config.learning_rate * lr_factor(goes_on, course.span, config, after)
    if math.isclose(going_on, now, rel_tol=NOTICED):
        return None
    return (
        f"the learning rate changes from {last:.3g} at step {state.step} to {now:.3g} at step "
        f"{state.step + 1}: its schedule was {old.schedule} over {state.total_steps} steps, "
        f"and is {config.schedule} over {course.total_steps}"
    )
