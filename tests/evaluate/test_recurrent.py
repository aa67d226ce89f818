"""Targets with a recurrent state: restored after a verification, so answers stay their own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from specforge_core.errors import ConfigError
from specforge_core.evaluate import cached
from specforge_core.evaluate.cached import CachedTarget, abilities
from specforge_core.evaluate.decode import Limits, generate
from specforge_core.evaluate.lossless import reference
from specforge_core.evaluate.tree import depths
from specforge_core.types import CaptureSpec, Proposal, Sampling, TargetCapture

from ..families import build

PROMPT = [5, 17, 3, 44, 8, 29, 11]
SPEC = CaptureSpec(layers=(1, 6), final="post_norm", fields={})
RECURRENT = [
    *("qwen3_next", "qwen3_5_text", "falcon_h1", "jamba", "bamba", "lfm2", "minimax", "mamba2"),
    "recurrent_gemma",
]


class Guesser:
    """Drafts chains or random trees that are right in about two places of three."""

    max_tokens = 6

    def __init__(self, answer: Sequence[int], trees: bool) -> None:
        self.answer, self.trees = answer, trees
        self.draw = random.Random(0)
        self.seen: list[TargetCapture] = []

    def start(self, prefix: TargetCapture) -> None:
        self.seen = [prefix]

    def accept(self, accepted: TargetCapture) -> None:
        self.seen.append(accepted)

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        done = sum(len(capture.input_ids) for capture in self.seen[1:]) + 1
        assert self.answer[done - 1] == last_token
        count = min(max_tokens, self.draw.randint(1, self.max_tokens))
        low = -1 if self.trees else None
        parents = [i - 1 if low is None else self.draw.randint(low, i - 1) for i in range(count)]
        tokens = [
            self.answer[done + level - 1] if self.draw.random() < 0.7 else self.draw.randrange(250)
            for level in depths(parents)
        ]
        tree = torch.tensor(parents) if self.trees else None
        return Proposal(tokens=torch.tensor(tokens), probs=None, parents=tree)


@pytest.mark.slow
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("family", RECURRENT)
def test_answers_are_the_targets_own(family: str, trees: bool) -> None:
    model = build(family)
    want = reference(model, PROMPT, Limits(40, frozenset())).tokens
    proposer = Guesser(want, trees)
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    answer = generate(model, proposer, SPEC, PROMPT, Limits(20, frozenset()), greedy)
    assert answer.tokens == want[:20]
    stats = answer.stats
    assert stats.acceptance_length is not None
    assert 1 < stats.acceptance_length < 7
    assert stats.extra_runs > 0
    ids = torch.cat([capture.input_ids for capture in proposer.seen])
    with torch.no_grad():
        first = 0 if family == "mamba2" else 1  # it does not list the embedding
        states = model(ids[None], output_hidden_states=True).hidden_states
    for layer in SPEC.layers:
        found = torch.cat([capture.hidden_states[layer] for capture in proposer.seen])
        error = (found - states[layer + first][0]).norm() / found.norm()
        assert error < 1e-2  # other shapes of a pass add up otherwise; a wrong state is far off


def test_a_state_that_is_not_restored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_next")
    assert abilities(model).recurrent
    monkeypatch.setattr(cached, "_STATES", ())
    with pytest.raises(ConfigError, match="keeps a state that cannot be taken back"):
        abilities(build("qwen3_next"))


def test_what_attention_keeps_is_cropped_and_nothing_runs_again() -> None:
    model = build("llama")
    target = CachedTarget(model, None)
    target.run(PROMPT, 1)
    target.run([1, 2, 3, 4], 4)
    target.settle([1, 2, 3, 4], (0,), tree=False)
    assert (target.length, target.runs) == (len(PROMPT) + 2, 2)
    assert target.cache.get_seq_length() == len(PROMPT) + 2
