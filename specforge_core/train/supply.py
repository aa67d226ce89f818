"""The micro-batches of one rank, also where a signal comes before they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .. import stop
from ..batches.loader import Micro
from ..batches.prefetch import Prefetcher


class Supply:
    """Takes micro-batches as they are made ready, unless the run is asked to stop."""

    def __init__(self, batches: Prefetcher[Micro], *, alone: bool) -> None:
        """`alone` says that there is no other rank."""
        self._batches, self._alone = batches, alone
        self._latest: Micro | None = None
        self.short = False  # a stop was asked for while this rank waited for a micro-batch

    def next(self) -> Micro | None:
        """Return the next micro-batch; None where a stop is asked for and none is ready.

        The other ranks may be in this step already and wait for this one.  Then it takes part with
        the micro-batch before, and tells them by `short` that this step and those after it, which
        they may launch before they hear of it, do not count.
        """
        if self.short:
            return self._stand_in()
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
