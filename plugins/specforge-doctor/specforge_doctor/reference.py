"""What the reference accepts of a draft: in the lossless loop, and token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from specforge_core.errors import ConfigError
from specforge_core.evaluate.bench import EvalPrompt
from specforge_core.evaluate.cached import CachedTarget
from specforge_core.evaluate.decode import Limits, generate, pick, room
from specforge_core.evaluate.run import open_target, ready_proposer
from specforge_core.progress import track
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec, Draft, Proposer, Sampling

from .inputs import Answers, Inputs
from .stats import Measurement, Tally

LOOP = "reference loop"
EVERYWHERE = "draft, at every token"


@dataclass(frozen=True, slots=True)
class Reference:
    """The target in this process, ready to verify drafts."""

    inputs: Inputs
    engine: TransformersEngine
    spec: CaptureSpec
    limits: Limits

    def proposer(self, draft: Draft) -> Proposer:
        """Return what drafts; the draft is moved to the target's device and dtype."""
        return ready_proposer(self.inputs.run, self.inputs.strategy, draft, self.engine)

    def loop(self, name: str, proposer: Proposer) -> tuple[Measurement, Answers]:
        """Answer every prompt as `specforge eval` does."""
        tallies, answers = [], []
        with track(name, len(self.inputs.prompts)) as tracker:
            for prompt in self.inputs.prompts:
                answer = generate(
                    self.engine.model,
                    proposer,
                    self.spec,
                    prompt.input_ids,
                    self.limits,
                    greedy(),
                )
                tallies.append(Tally(answer.stats.emitted, answer.stats.verifications))
                answers.append(answer.tokens)
                tracker.advance()
        return Measurement(name, tuple(tallies)), answers

    @torch.inference_mode()
    def everywhere(self, proposer: Proposer, answers: Answers, draft_tokens: int) -> Measurement:
        """Draft behind every token of the answers; count hits before the first miss, plus one.

        The end of an answer is a miss, as it is in training.
        """
        tallies = []
        with track(EVERYWHERE, len(answers)) as tracker:
            for prompt, answer in zip(self.inputs.prompts, answers, strict=True):
                tallies.append(self._tally(proposer, prompt, answer, draft_tokens))
                tracker.advance()
        return Measurement(EVERYWHERE, tuple(tallies))

    def _tally(
        self, proposer: Proposer, prompt: EvalPrompt, answer: tuple[int, ...], draft_tokens: int
    ) -> Tally:
        ids, begin = [*prompt.input_ids, *answer], len(prompt.input_ids)
        _, states = CachedTarget(self.engine.model, self.spec).run(ids, keep=1)
        assert states is not None
        space = begin + room(self.engine.model, prompt.input_ids)
        proposer.start(pick(states, list(range(begin)), supervised=False))
        emitted = 0
        for last in range(begin, len(ids) - 1):
            asked = min(draft_tokens, space - last - 1)
            proposal = proposer.propose(ids[last], asked, greedy())
            if proposal.parents is not None:
                raise ConfigError(
                    "the doctor compares drafted chains, and this run drafts trees. Set the "
                    f"strategy's options: specforge check {self.inputs.strategy.name} lists them"
                )
            hits = 0
            for drafted, token in zip(proposal.tokens.tolist(), ids[last + 1 :], strict=False):
                if drafted != token:
                    break
                hits += 1
            emitted += 1 + hits
            proposer.accept(pick(states, [last], supervised=True))
        return Tally(emitted, max(0, len(answer) - 1))


@contextmanager
def open_reference(inputs: Inputs) -> Iterator[Reference]:
    """Load the target as `specforge eval` does; it is dropped again, whatever happens."""
    with open_target(inputs.run, inputs.strategy) as (engine, spec, limits):
        yield Reference(inputs, engine, spec, limits)


def greedy() -> Sampling:
    """Return how everything is drawn here."""
    return Sampling(temperature=0.0, generator=torch.Generator())
