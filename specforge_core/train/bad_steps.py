"""Steps that are not applied, because their loss or gradient norm is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist

from ..errors import RunError
from .dist import World
from .metrics import Trackers
from .report import Launched


@dataclass(slots=True)
class BadSteps:
    """Tells of bad steps, and ends a run that has too many in a row."""

    world: World
    trackers: Trackers
    allowed: int  # in a row
    in_a_row: int = 0

    def leave_out(self, launched: Launched, loss: float, norm: float) -> None:
        """Tell of a step that was not applied; RunError when there were too many in a row."""
        self.in_a_row += 1
        everyone: list[tuple[int, ...]] = [launched.indices] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(everyone, launched.indices)
        indices = sorted(index for part in everyone for index in part)
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        problem = f"the {what} of step {launched.step} is {value}"
        told = ", ".join(map(str, indices))
        self.world.say(f"warning: {problem}. The step was left out; its samples: {told}")
        self.trackers.event("bad_step", step=launched.step, samples=indices)
        if self.in_a_row > self.allowed:
            raise RunError(
                f"{problem}, and train.max_bad_steps={self.allowed} such steps in a row are left "
                "out. Start again from the last checkpoint with a lower train.learning_rate, or "
                "check the capture: specforge verify CAPTURE_DIR"
            )

    def check_last(self, step: int) -> None:
        """Raise RunError if the run ends with a step that was left out."""
        if self.in_a_row:
            raise RunError(
                f"step {step}, the last one, was left out (see above), so nothing was saved "
                "after it. Start again from the last checkpoint with a lower train.learning_rate"
            )
