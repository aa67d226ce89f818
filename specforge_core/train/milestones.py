"""What is measured in a run, when, and what follows: the best checkpoint, an early end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ..config import RunConfig
from ..drafts.checkpoint import checkpoints
from ..drafts.state import step_of
from ..evaluate.beside import Outcome
from ..evaluate.curves import whole_lines
from ..evaluate.plot import plot_progress
from ..process import describe
from .acceptance import Acceptance
from .best import Best
from .checkpoint import Kept, place_of, tidy
from .dist import World
from .metrics import METRICS, Trackers, is_measurement
from .validation import PREFIX, Validation

PLOT = "eval/progress.png"
# what a user reads while a run goes on, by its name in metrics.jsonl
SAID = {
    "validation/loss": "validation loss",
    "validation/acceptance_length": "simulated acceptance length",
    "acceptance/length": "acceptance length",
}
SECONDS = "eval/seconds"  # also of one that was given up, which is not tried again


@dataclass(slots=True)
class Milestones:
    """Nothing happens, and no rank waits for another, in a run that measures nothing."""

    run: RunConfig
    world: World
    trackers: Trackers
    validation: Validation | None
    acceptance: Acceptance | None
    best: Best | None
    measured: int = -1  # the last step that was
    wanted: int | None = None  # whose checkpoint is to be evaluated beside, once it is there
    lost: int | None = None  # the step of a checkpoint whose evaluation beside was cut off
    stopped: bool = False  # a stop cut a measurement off: the run ends at this step, on all ranks
    cut_off: frozenset[str] = frozenset()  # what was cut off so at the step where the run goes on
    seconds: float = 0.0  # spent here, of which nothing is training

    def due(self, step: int) -> bool:
        """Say whether something is measured after `step`."""
        return self._validates(step) or self._evaluates(step)

    def _validates(self, step: int) -> bool:
        config = self.run.train
        every = config.validate_every or config.save_every
        return self.validation is not None and step % every == 0

    def _evaluates(self, step: int) -> bool:
        every = self.run.train.eval_every
        return self.acceptance is not None and every is not None and step % every == 0

    def reach(self, step: int, total_steps: int, *, last: bool) -> bool:
        """Measure what is due after `step`, all at the `last` one; say whether to save it.

        Called on all ranks at once.
        """
        began = time.monotonic()
        self.measured = step
        save = False
        if self.validation is not None and (last or self._validates(step)):
            values = self.validation.run(step, total_steps)
            self.stopped |= values is None
            if values is not None:
                save |= self._take(step, values)
        last |= self.over  # behind the validation: nothing comes after this step
        if self.acceptance is not None and (last or self._evaluates(step)):
            found = self.acceptance.now(step)
            self.stopped |= self.acceptance.inside and not found
            save |= self._hear(found, step)
            if last:  # what still runs beside makes place for this one
                save |= self._hear(self.acceptance.rest(), step)
            if not self.acceptance.inside:
                self.wanted, save = step, True
        self.seconds += time.monotonic() - began
        return save

    def saved(self, step: int) -> None:
        """Begin with what reads a checkpoint, once that of `step` is there."""
        if self.wanted == step:
            self.wanted = None
            with self._warning("acceptance"):
                self._begin(step)

    def finish(self, step: int) -> None:
        """Wait for what is still measured, and draw all of it.  On all ranks at once.

        The checkpoint of `step`, the last one, is there.
        """
        self._tidy()  # a run that was killed behind its last checkpoint may have too many
        self.saved(step)
        if self.acceptance is not None:
            self._hear(self.acceptance.rest(), None)
        best = self.best
        if best is not None and best.over:
            self.world.say(
                f"train.patience={best.patience}: no better {best.metric} since step {best.step} "
                f"({best.value:.4g}), so the training ended"
            )
        metrics = self.run.output_dir / METRICS
        if self.acceptance is not None and self.world.main and metrics.exists():
            with self._warning(PLOT):
                plot_progress(metrics, self.run.output_dir / PLOT)

    @property
    def over(self) -> bool:
        """Whether the run ends before its last step, since nothing gets better."""
        return self.best is not None and self.best.over

    @property
    def kept(self) -> Kept:
        """Which checkpoints stay."""
        best = None if self.best is None else self.best.step
        reading = frozenset[int]() if self.acceptance is None else self.acceptance.reading
        return Kept(self.run.train.keep, best, reading)

    def resume(self, step: int, *, ended: bool) -> None:
        """Learn what was measured before the run goes on after `step`.  On all ranks at once."""
        if self.validation is None and self.acceptance is None:
            return
        rows = self.world.from_first(self._rows(step) if self.world.main else [])
        there = {step_of(path) for path in checkpoints(self.run.output_dir)}
        for row in rows:
            if self.best is not None:
                self.best.take(int(row["step"]), row, usable=row["step"] in there)
        heard = {row["step"] for row in rows if row.keys() & {"eval/verifications", SECONDS}}
        validated = {row["step"] for row in rows if any(name.startswith(PREFIX) for name in row)}
        missed = {
            "validation": (ended or self._validates(step)) and step not in validated,
            "acceptance": (ended or self._evaluates(step)) and step not in heard,
        }
        self.cut_off = frozenset(name for name, is_missed in missed.items() if is_missed)
        owed = [
            at
            for at in there
            if at is not None and at <= step and at not in heard
            if self._evaluates(at) or (ended and at == step)
        ]
        self.lost = max(owed, default=None)

    def again(self, step: int, total_steps: int) -> None:
        """Measure after `step`, where the run goes on, what was cut off.  On all ranks at once.

        Of the evaluations beside that ended with their training's process the newest is begun anew.
        """
        if self.validation is not None and "validation" in self.cut_off:
            values = self.validation.run(step, total_steps)
            if values is not None and self._take(step, values):
                self._tidy()
        if self.acceptance is None:
            return
        if self.acceptance.inside and "acceptance" in self.cut_off:
            self._hear(self.acceptance.now(step), None)
        elif not self.acceptance.inside and self.lost is not None:
            with self._warning("acceptance"):
                self._begin(self.lost)

    def _begin(self, step: int) -> None:
        assert self.acceptance is not None
        why = self.acceptance.begin(step, place_of(self.run.output_dir, step))
        if why:
            self.world.say(f"acceptance of step {step} is not measured: {why}")

    def _rows(self, step: int) -> list[dict[str, float]]:
        """Return the measurements in metrics.jsonl up to a step, in the order of steps."""
        lines = whole_lines(self.run.output_dir / METRICS)
        rows = [row for _, row in lines if row is not None]
        found = [row for row in rows if is_measurement(row) and row["step"] <= step]
        return sorted(found, key=lambda row: row["step"])

    def _hear(self, outcomes: list[Outcome], now: int | None) -> bool:
        """Log what evaluations found; say whether the weights of this moment are the best."""
        save = False
        for outcome in outcomes:
            if outcome.failure:
                self.world.say(
                    f"warning: acceptance of step {outcome.step} was not measured: "
                    f"{outcome.failure}"
                )
                if outcome.metrics:
                    self.trackers.log(outcome.step, outcome.metrics)
                continue
            if self._take(outcome.step, outcome.metrics):
                if outcome.step == now:
                    save = True
                else:  # its checkpoint is there already
                    self._tidy()
        return save

    def _tidy(self) -> None:
        if self.world.main:
            with self._warning("checkpoints"):
                tidy(self.run.output_dir, self.kept)

    @contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """Go on where something fails that the training does not need."""
        try:
            yield
        except Exception as exc:
            self.world.say(f"warning: {what}: {describe(exc)[0]}")

    def _take(self, step: int, values: Mapping[str, float]) -> bool:
        self.trackers.log(step, values)
        best = self.best if self.best is not None and self.best.take(step, values) else None
        if found := [f"{text} {values[name]:.4g}" for name, text in SAID.items() if name in values]:
            ahead = ", the best so far" if best is not None else ""
            self.world.say(f"step {step}: {', '.join(found)}{ahead}")
        if best is not None:
            self.trackers.event("best", step=step, **{best.metric: best.value})
        return best is not None
