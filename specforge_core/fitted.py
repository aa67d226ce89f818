"""Options by which a step fits its devices: they change no result but by rounding."""

from __future__ import annotations

from pydantic import Field

from .watched import Watched


class Fitted(Watched):
    """What a step's memory and work are traded by."""

    recompute: bool = Field(
        False,
        description="Make the draft's units a second time in the backward pass instead of keeping "
        "what they computed: less memory, more time.",
    )
