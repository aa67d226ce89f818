"""The loss and metrics of what is held out, by the step of the training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from .. import stop
from ..batches.loader import Batches
from ..batches.prefetch import Prefetcher
from ..types import CaptureSpec
from .feed import HeldOut
from .forward import Forward
from .metrics import Reducer

PREFIX = "validation/"
CLOSE_SECONDS = 1.0  # that a capture has to end when a stop is asked for


@dataclass(slots=True)
class Validation:
    """Runs the step over all of `data.validation`, on all ranks, without gradients.

    Each sample is taken once, what its transform draws is the same every time and on any number
    of ranks, and sums are divided once, so that two validations compare.
    """

    forward: Forward
    spec: CaptureSpec
    held_out: HeldOut
    reducer: Reducer  # of its own: the metrics may be others than those of training
    _batches: Batches | None = None

    def run(self, step: int, total_steps: int) -> dict[str, float] | None:
        """Return every metric under its name in metrics.jsonl; None where a stop is asked for.

        Called on all ranks at once.  A loss that changes over a run is taken as at its end.
        """
        model = self.forward.draft.model
        if self._batches is None:
            self._batches = self.forward.batches(self.spec, self.held_out.num_samples)
        world, outputs, done = self.forward.world, [], 0
        model.eval()
        # alone, it hears of a stop while it waits; others may wait for this rank in the same batch
        made = self._batches.micro_batches(self.held_out.source, 0)
        micros = Prefetcher(made, 0, world.device, inner=world.size > 1)
        try:
            while done < self.held_out.num_samples:
                try:
                    micro = None if self._stopping() else next(micros)
                except stop.Interrupted:
                    micro = None
                if micro is None:
                    self.held_out.source.close()  # the run ends: no window is waited for
                    return None
                micro.arrive()
                done = micro.position
                context = self.forward.context(step, total_steps, 1.0, training=False)
                with torch.no_grad():
                    outputs.append(self.forward(micro, context))
        finally:
            micros.close(math.inf if stop.asked() is None else CLOSE_SECONDS)
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # as a backward pass would
        sums, _ = self.reducer.reduce(outputs, (0.0,)).read()
        return {f"{PREFIX}{name}": value for name, value in sums.ratios().items()}

    def _stopping(self) -> bool:
        """Say whether any rank is asked to stop."""
        world = self.forward.world
        if world.size == 1:
            return stop.asked() is not None
        flag = torch.tensor(float(stop.asked() is not None), device=world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())
