"""What is drafted: the walk over the candidates, against the float64 form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash2.proposer import DFlash2Proposer

from specforge_core.testing.close import close
from specforge_core.types import Sampling, TargetCapture

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23 + 4 * 26) + 24 + 24 + 5


def proposer(tiny: Any) -> DFlash2Proposer:
    return DFlash2Proposer(tiny.config, tiny.model, tiny.frozen)


def captured(tiny: Any, sample: Any, start: int, end: int) -> TargetCapture:
    layers = tiny.model.backbone.shape.capture_layers
    states = sample["hidden_states"][start:end].split(24, dim=-1)
    ids = sample["input_ids"][start:end]
    return TargetCapture(
        index=0,
        input_ids=ids,
        loss_mask=torch.zeros_like(ids),
        hidden_states=dict(zip(layers, states, strict=True)),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 5}, {"softcap": 3.0, "output_multiplier": 2.0}],
    ids=str,
)
def test_greedy_drafts_walk_over_the_candidates(kit: Any, options: dict[str, Any]) -> None:
    """In pieces, with the context cached."""
    tiny, sample = kit.tiny(**options), kit.samples((19,))[0]
    weights = kit.weights64(tiny)
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 5))
    length, changed = 5, 0
    for accepted in (3, 1, 0, 6):
        if accepted:
            found.accept(captured(tiny, sample, length, length + accepted))
        length += accepted
        last = before = int(sample["input_ids"][length])
        states = kit.states64(weights, tiny, sample["hidden_states"], last, length).detach()
        want = []
        for state in states[1:]:
            logits = kit.logits64(tiny, state)
            best = logits.topk(6).indices.tolist()
            scores = logits[best] + kit.edges64(weights, state, before, best).detach()
            before = best[int(scores.argmax())]
            want.append(before)
            changed += before != best[0]
        assert found.propose(last, 99, GREEDY).tokens.tolist() == want
        assert found.propose(last, 2, GREEDY).tokens.tolist() == want[:2]
    assert changed  # else the selector did nothing


def test_sampled_tokens_follow_the_probabilities_they_come_with(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot's are those behind the token that was drawn before it."""
    tiny, sample = kit.tiny(block_size=3), kit.samples((19,))[0]
    found, weights = proposer(tiny), kit.weights64(tiny)
    found.start(captured(tiny, sample, 0, 6))
    states = kit.states64(weights, tiny, sample["hidden_states"], 3, 6).detach()[1:]

    def exact(k: int, before: int) -> torch.Tensor:
        logits = kit.logits64(tiny, states[k])
        best = logits.topk(6).indices
        scores = logits[best] + kit.edges64(weights, states[k], before, best.tolist()).detach()
        return torch.zeros(41, dtype=torch.float64).scatter(0, best, (scores / 4).softmax(0))

    sampling = Sampling(temperature=4.0, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 41)
    lattice = found.lattice(3)
    monkeypatch.setattr(found, "lattice", lambda _last: lattice)  # the same block every time
    for number in range(600):
        proposal = found.propose(3, 2, sampling)
        tokens = proposal.tokens.tolist()
        assert proposal.probs is not None
        if number < 20:
            close(proposal.probs[0], exact(0, 3), terms=TERMS)
            close(proposal.probs[1], exact(1, tokens[0]), terms=TERMS)
        counts[[0, 1], tokens] += 1
    first = exact(0, 3)
    second = torch.stack([first[t] * exact(1, t) for t in range(41)]).sum(0)
    for seen, probs in zip(counts, (first, second), strict=True):
        can = probs > 0
        assert not seen[~can].any()
        assert ((seen - 600 * probs) ** 2 / (600 * probs))[can].sum() < 25  # 5 degrees: 1 in 7,000


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    tiny.model.bfloat16()
    tiny.frozen.bfloat16()
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 6))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, generator=torch.Generator())
        assert found.propose(3, 3, sampling).tokens.shape == (3,)
