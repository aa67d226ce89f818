"""The options by which a training watches itself: what is measured, answered, and follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import MANY, Section


class Watched(Section):
    """The part of `train` that says when a run is measured, and when its data grows."""

    validate_every: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Steps between validations on `data.validation`; if not set: save_every.",
    )
    eval_every: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Steps between evaluations: `eval.prompts` are decoded with the weights of "
        "that moment.",
    )
    eval_seconds: float = Field(
        300.0,
        gt=0,
        le=1e6,
        description="Training waits no longer than this for an evaluation; one that takes longer "
        "is given up.",
    )
    keep_best: Literal["acceptance", "validation_loss"] | None = Field(
        None, description="Keep the checkpoint that is best by this: OUTPUT_DIR@best."
    )
    patience: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="The training ends after as many measurements for `keep_best` without a "
        "better one.",
    )
    regenerate_every: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Steps after which the target begins to answer a share of "
        "`regenerate.prompts` while training goes on; the next epoch has these rows, too.",
    )
    regenerate_prompts: int = Field(
        256, gt=0, le=MANY, description="Prompts in such a share. Each is answered once."
    )


def a_part(value: float) -> float:
    """Return a part of the data; raises ValueError for all of it, or nothing."""
    if value == 0:
        raise ValueError("a part of the data is more than 0 (to hold out nothing: [])")
    if not 0 < value < 1:
        raise ValueError("a part of the data is more than 0 and less than 1, such as 0.02")
    return value


def check_watched(train: Watched, *, validation: bool, prompts: bool) -> None:
    """Raise ValueError for a measurement that has nothing to measure.

    `validation` and `prompts` say whether `data.validation` and `eval.prompts` are given.
    """
    held_out = "data.validation. Try: data.validation=0.02, or data.validation=[FILE.jsonl]"
    asked = "eval.prompts. Try: eval.prompts.chat=FILE.jsonl"
    if train.validate_every is not None and not validation:
        raise ValueError(f"train.validate_every needs {held_out}")
    if train.eval_every is not None and not prompts:
        raise ValueError(f"train.eval_every needs {asked}")
    if train.keep_best == "validation_loss" and not validation:
        raise ValueError(f"train.keep_best=validation_loss needs {held_out}")
    if train.keep_best == "acceptance" and train.eval_every is None:
        raise ValueError("train.keep_best=acceptance needs train.eval_every. Try: 500")
    if train.patience is not None and train.keep_best is None:
        raise ValueError(
            "train.patience counts measurements for train.keep_best. "
            "Try: train.keep_best=validation_loss, or acceptance"
        )


def check_grows(train: Watched, *, online: bool, steps: bool, prompts: bool) -> None:
    """Raise ValueError for a training whose data cannot grow as `regenerate_every` asks.

    `online`: the target is there; `steps`, `prompts`: `train.max_steps`, `regenerate.prompts` are.
    """
    if train.regenerate_every is None:
        return
    if not online:
        raise ValueError(
            "train.regenerate_every needs the target, which is not run with data.capture_dir. "
            "Take data.capture_dir out, or answer before: specforge regenerate"
        )
    if not prompts:
        raise ValueError(
            "train.regenerate_every needs regenerate.prompts. "
            "Try: regenerate.prompts=[PROMPTS.jsonl]"
        )
    if not steps:
        raise ValueError(
            "train.regenerate_every needs train.max_steps, since epochs grow. "
            "Try: train.max_steps=10000"
        )
