"""The micro-batches of one rank, also where a signal comes before they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .. import stop
from ..batches.loader import Micro
from ..batches.prefetch import Prefetcher
from .dist import World


class Supply:
    """Takes micro-batches as they are made ready, unless the run is asked to stop."""

    def __init__(self, batches: Prefetcher[Micro], world: World, beside: bool = False) -> None:
        """`beside`: the target captures on this process's device meanwhile.

        A rank whose batch is there waits on the host then until all have theirs.  In a kernel of
        NCCL it would hold a part of the GPU that its own target's captures need: a matrix product
        that finds one multiprocessor taken may take twice as long.
        """
        self._batches, self._alone = batches, world.size == 1
        self._meet = world.meeting() if beside and not self._alone else None
        self._latest: Micro | None = None
        self.short = False  # a stop was asked for while this rank waited for a micro-batch

    def next(self) -> Micro | None:
        """Return the next micro-batch; None where a stop is asked for and none is ready.

        The other ranks may be in this step already and wait for this one.  Then it takes part with
        the micro-batch before, and tells them by `short` that this step and those after it, which
        they may launch before they hear of it, do not count.
        """
        found = self._stand_in() if self.short else self._next()
        if self._meet is not None:
            self._meet()
        return found

    def _next(self) -> Micro | None:
        try:
            self._latest = next(self._batches)
        except stop.Interrupted:
            if self._alone:
                return None
            if self._latest is None:  # nobody has done a step
                raise
            self.short = True
            return self._stand_in()
        self._latest.arrive()
        return self._latest

    def renew(self, make: Callable[[], Prefetcher[Micro]]) -> None:
        """Go on with other micro-batches; those made ready so far are not used."""
        self._batches.close()
        self._batches = make()

    def close(self, seconds: float) -> None:
        """End what makes them, no longer than `seconds`."""
        self._batches.close(seconds)

    def _stand_in(self) -> Micro:
        assert self._latest is not None
        return replace(self._latest, num_samples=0, num_tokens=0, indices=())
