"""Whether greedy answers with a draft are the target's own, wherever an answer may end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from ..evaluate.decode import Limits, generate, generate_plain
from ..evaluate.run import open_target, ready_proposer
from ..types import Sampling
from .case import Case

ANSWER = 24  # tokens of an answer
ROOM = 3  # tokens that a long prompt leaves of the target's positions: fewer than a draft's


def check_greedy(case: Case, text: Sequence[int]) -> None:
    """Assert that answers to the beginnings of a text are those of the target alone.

    Behind one token and behind a few; of one token, cut by an end of text, and up to the last of
    the target's positions.
    """
    run, strategy = case.job.run, case.job.strategy
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    with open_target(run, strategy) as (engine, spec, _):
        proposer = ready_proposer(run, strategy, case.draft, engine)
        positions = engine.model.config.max_position_embeddings
        few, long = text[:7], list(islice(cycle(text), positions - ROOM))
        for prompt, most in ((text[:1], ANSWER), (few, ANSWER), (few, 1), (long, ANSWER)):
            whole = generate_plain(engine.model, prompt, Limits(most, frozenset()), greedy).tokens
            for end in ((), whole[len(whole) // 2 :][:1]):
                limits = Limits(most, frozenset(end))
                alone = generate_plain(engine.model, prompt, limits, greedy)
                found = generate(engine.model, proposer, spec, prompt, limits, greedy)
                assert found.tokens == alone.tokens, f"behind {len(prompt)}, {most} more, {end}"
