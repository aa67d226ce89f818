"""The bases of a config's sections: the core's, a strategy's, a plugin's own."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationInfo,
    field_validator,
)

# More is never meant, and would hang a run or crash torch
MANY = 10**9
SEEDS = 2**32 - 1
EMPTY = "a path is empty"
COLDEST = 1e-3  # logits over less than this overflow


def expand(path: str) -> str:
    """Return a path with the user's folder in the place of `~`."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # nobody has this name
        return path


def fits(path: str) -> str:
    """Refuse what no file system takes as a path."""
    if not path:
        raise ValueError(EMPTY)
    names = [os.fsencode(name) for name in path.split("/")]
    if any(b"\0" in name for name in names):
        raise ValueError("a path has no NUL in it")
    if max(map(len, names)) > 255 or sum(map(len, names)) + len(names) > 4096:
        raise ValueError("this path is too long: 255 bytes for a name, 4095 in all")
    return path


def _usable(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(fits(expand(str(value))))
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("this number is larger than a machine's integers")
    return value


def _warm(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(f"a temperature is 0 (the likeliest token), or {COLDEST} and more")
    return temperature


PathText = Annotated[str, AfterValidator(expand), AfterValidator(fits)]
Temperature = Annotated[float, AfterValidator(_warm)]


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after validation, finite numbers."""

    # what pydantic says of a wrong value must not show a secret that stands beside it
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a truth for a number, and no text for a path, which would be where one is."""
        field = cls.model_fields.get(info.field_name or "")
        kinds = set() if field is None else {field.annotation, *get_args(field.annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("Input should be a number")
        if Path in kinds and (value == "" or (isinstance(value, list | tuple) and "" in value)):
            raise ValueError(EMPTY)
        return value

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(_usable, value))
        if isinstance(value, dict):
            return {key: _usable(one) for key, one in value.items()}
        return _usable(value)


class MayChange(Enum):
    """Marks an option of a strategy that may differ from what a draft was trained with.

    All others count: a draft is resumed, evaluated, exported and started from only with the
    values it was trained with.  Written as `Annotated[int, MayChange.ALWAYS] = Field(...)`.
    """

    AT_START = "at_start"  # of the objective only: `train.init_from` says it and goes on
    ALWAYS = "always"  # changes neither draft nor objective, or is compared as `Draft.resolved`


class StrategyConfig(Section):
    """Base of every strategy's own section.  `name` selects the plugin.

    Every option counts as part of what a draft is, unless it is marked with `MayChange`.
    """

    name: str
