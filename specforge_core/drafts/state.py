"""state.json: all that a checkpoint knows and is no tensor; read strictly, anyone may edit it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictStr,
    ValidationError,
    field_validator,
)
from pydantic_core import from_json, to_json

from ..capture.manifest import CaptureIdentity
from ..checksums import checksum
from ..config import TrainConfig
from ..documents import parse_json, read_document, read_object, why_invalid
from ..errors import CheckpointError

STATE, CHECKSUMS = "state.json", "checksums.json"
STEP = re.compile(r"step-([0-9]{8,12})")
MOST = 10**15  # of anything counted, so that no arithmetic of a resumed run overflows

Count = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=MOST)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


Share = Annotated[str, Field(strict=True, pattern=r"^[0-9]{8,12}-[0-9]{8,12}\.jsonl$")]


class Grown(BaseModel):
    """How far the data of a run has grown that has `train.regenerate_every`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epoch: Count  # that is trained on
    begin: Count  # the position at which it began
    files: dict[Share, StrictStr]  # name of each file of answers in it -> its checksum
    taken: Count  # prompts that are answered, or are being answered
    asked: Annotated[list[tuple[Count, Count]], Field(max_length=10**6)]  # not in it yet
    asked_at: Count  # the last step after which answers were asked for
    prompts: StrictStr  # what tells those that are `taken` from others


class TrainState(BaseModel):
    """Everything a resumed run needs that is no tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Count  # optimizer steps done
    total_steps: Positive  # that the schedule of learning rates was over
    num_tokens: Count  # trained on, by all ranks
    seconds: Annotated[float, Field(strict=True, ge=0, le=MOST)]  # spent training
    strategy: StrictStr
    position: Count  # samples of the endless sequence of epochs done with
    config: dict[str, Any]
    versions: dict[str, StrictStr]
    identity: CaptureIdentity  # target, layers, tokenizer, template
    resolved: dict[str, Any] = {}  # `Draft.resolved`
    machine: dict[str, Any] = {}  # dtypes and threads it computed with
    length: Positive | None = None  # samples that the schedule is over; None: total_steps
    logged: Count | None = None  # last step whose line of metrics ended a window; None: step
    window: dict[str, tuple[Finite, Finite]] = {}  # sums since then
    grown: Grown | None = None
    first_window: Positive | None = None  # rows shuffled together in the first epoch, if others

    @field_validator("config")
    @classmethod
    def _sections(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name in ("target", "strategy", "data", "train"):
            if not isinstance(config.get(name), dict):
                raise ValueError(f"has no section {name}")
        try:
            TrainConfig.model_validate(config["train"])
        except ValidationError as exc:
            raise ValueError(f"train.{why_invalid(exc)}") from None
        return config


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name; None for what is not named as one."""
    found = STEP.fullmatch(path.name)
    return None if found is None else int(found[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first.

    Only `checkpoints/step-NNNNNNNN` with a state.json is one, whatever else lies there.
    """
    found = [(step_of(path), path) for path in output_dir.glob("checkpoints/step-*")]
    whole = [(step, path) for step, path in found if step is not None and (path / STATE).is_file()]
    return [path for _, path in sorted(whole)]


def instead(path: Path) -> str:
    """Return what can be done where a file of a checkpoint is damaged, also by a link's name."""
    path = path.resolve()
    step, run = step_of(path), path.parent.parent
    earlier = [p for p in checkpoints(run) if step is not None and (step_of(p) or 0) < step]
    restore = f"Restore it, or {CHECKSUMS} if that is what was changed, from a copy, or "
    if earlier:
        return f"{restore}use {earlier[-1]}. To train on from there: rm -r {path}"
    return f"{restore}train again: no earlier checkpoint is beside it. Try: output_dir=ANOTHER"


def read_checksums(path: Path) -> dict[str, Any] | None:
    """Return the checksums of a checkpoint's files; None where a version wrote it without.

    Raises CheckpointError.
    """
    try:
        if not (found := read_object(path / CHECKSUMS)):
            raise ValueError("it names no file")
    except (OSError, ValueError) as exc:
        if not os.path.lexists(path / CHECKSUMS):
            return None
        raise CheckpointError(f"{path / CHECKSUMS} is damaged: {exc}. {instead(path)}") from exc
    return found


def read_state(path: Path) -> TrainState:
    """Read a checkpoint's state.json.

    Raises CheckpointError when it is missing, damaged, or another version's.
    """
    told = None
    try:
        data = read_document(path / STATE)
        told = (read_checksums(path) or {}).get(STATE)
        if told is not None and (found := checksum(data)) != told:
            raise ValueError(f"its checksum is {found}, {told!s:.40} was written")
        parse_json(data)  # each key once
        raw = from_json(data, allow_inf_nan=False)
        state = TrainState.model_validate_json(to_json(_current(raw)))  # lists for tuples
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {STATE}. Try: --checkpoint OUTPUT_DIR"
        ) from exc
    except (ValueError, OSError) as exc:
        why = why_invalid(exc) if isinstance(exc, ValidationError) else str(exc)
        if told is not None and isinstance(exc, ValidationError):  # as its checksum is
            raise CheckpointError(
                f"{path / STATE} is whole, but another version of specforge_core wrote it: {why}. "
                "Install that version, or train again. Try: output_dir=ANOTHER"
            ) from exc
        raise CheckpointError(f"{path / STATE} is damaged: {why}. {instead(path)}") from exc
    if step_of(path) not in (None, state.step):
        raise CheckpointError(
            f"{path / STATE} is damaged: it is of step {state.step}. {instead(path)}"
        )
    return state


class _Old(BaseModel):
    """What 0.1 wrote instead of `position`: every rank counted its own samples."""

    world_size: Positive
    positions: Annotated[list[Count], Field(min_length=1)]


def _current(raw: Any) -> Any:
    """Return a state as this version writes it."""
    if not isinstance(raw, dict) or "positions" not in raw:
        return raw
    old = _Old.model_validate(raw)
    if len(old.positions) != old.world_size:
        raise ValueError(f"it has {len(old.positions)} positions of {old.world_size} ranks")
    kept = {k: v for k, v in raw.items() if k not in ("positions", "generators", "world_size")}
    config = raw.get("config")
    train = config.get("train") if isinstance(config, dict) else None
    total = train.get("max_steps") if isinstance(train, dict) else None
    position = min(old.positions) * old.world_size
    return {"total_steps": total or raw.get("step"), **kept, "position": position}
