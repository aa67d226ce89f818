"""Options by which a step fits its devices: they change no result but by rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import MANY
from .watched import Watched


class Fitted(Watched):
    """What a step's memory and work are traded by."""

    recompute: bool = Field(
        False,
        description="Make the draft's units a second time in the backward pass instead of keeping "
        "what they computed: less memory, more time.",
    )
    optimizer_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of what adamw and muon keep between steps (not of the weights); bfloat16 "
        "takes half the memory, for `train.betas` up to 0.98.",
    )
    shard_size: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Ranks that share one copy of weights, gradients and optimizer states, of "
        "ranks that follow each other; the other ranks hold copies. If not set: all share one.",
    )
