"""Acceptance of a draft that is being trained, with the target that already is in the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RunConfig
from ..errors import SpecForgeError
from ..locks import InTurn
from ..strategy import Strategy
from ..target.engine import TransformersEngine
from ..types import CaptureSpec, Draft
from .bench import EvalPrompt
from .decode import Limits
from .report import EvalReport
from .run import measure, ready_proposer, what_to_decode


class GivenUp(SpecForgeError):
    """An evaluation took longer than it may, or the command was asked to end."""


@dataclass(frozen=True, slots=True)
class Live:
    """A second draft, in the target's dtype, that takes the trained one's weights."""

    run: RunConfig
    strategy: Strategy
    engine: TransformersEngine
    lock: InTurn  # held by whoever uses the engine
    draft: Draft
    sets: Mapping[str, list[EvalPrompt]]
    spec: CaptureSpec
    limits: Limits

    @classmethod
    def open(
        cls,
        run: RunConfig,
        strategy: Strategy,
        engine: TransformersEngine,
        lock: InTurn,
        sets: Mapping[str, list[EvalPrompt]],
    ) -> Live:
        """Build the second draft; raises what the target or the strategy cannot do."""
        device = engine.model.device
        run = run.model_copy(update={"eval": run.eval.model_copy(update={"compare": False})})
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            draft = strategy.draft(run.strategy, engine.info, None)
        ready_proposer(run, strategy, draft, engine)
        with lock:
            spec, limits = what_to_decode(run, strategy, engine)
        return cls(run, strategy, engine, lock, draft, sets, spec, limits)

    def measure(self, weights: Mapping[str, Tensor], end: Callable[[], bool]) -> EvalReport:
        """Decode the prompts with a draft of these weights, by state_dict name.

        Raises GivenUp once `end` says so, which is asked at every run of the target.
        """

        def check(*_: object) -> None:
            if end():
                raise GivenUp("the evaluation was given up")

        model = self.draft.model
        model.load_state_dict(model.state_dict() | dict(weights))
        with self.lock:
            # before the copies that answer side by side are made: they have it as well
            hook = self.engine.model.register_forward_pre_hook(check)
            try:
                return measure(
                    self.run,
                    self.strategy,
                    self.draft,
                    self.sets,
                    self.engine,
                    self.spec,
                    self.limits,
                    quiet=True,
                )
            finally:
                hook.remove()
