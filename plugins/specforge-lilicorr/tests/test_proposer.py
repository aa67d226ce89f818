"""What is drafted: the walk through the lattice, against the float64 form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_lilicorr.proposer import LiLiCorrProposer

from specforge_core.testing.close import close
from specforge_core.types import Sampling

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 23) + 2 * (4 * 24 + 36) + 3 * 24 + 24 + 13


def proposer(tiny: Any) -> LiLiCorrProposer:
    return LiLiCorrProposer(tiny.config, tiny.model, tiny.frozen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 5, "lattice_hidden_size": 0},
        {"softcap": 3.0, "scale": 2.0, "bias": True},
        {"conv_kernel_size": 3, "conv_group_size": 8},
    ],
    ids=str,
)
def test_greedy_drafts_walk_through_the_lattice(kit: Any, options: dict[str, Any]) -> None:
    """In pieces, with the context cached, and from where there is none."""
    tiny, sample = kit.tiny(**options), kit.samples((19,))[0]
    model, found = kit.model64(tiny), proposer(tiny)
    found.start(kit.captured(sample, 0, 0))
    length, changed = 0, 0
    for accepted in (0, 5, 3, 0, 6):
        if accepted:
            found.accept(kit.captured(sample, length, length + accepted))
        length += accepted
        last = int(sample["input_ids"][length])
        with torch.no_grad():
            block = kit.block(model, tiny, sample["hidden_states"], last, length)
        want, before = [], None
        for k, ids in enumerate(block.ids):
            before = int(block.scores(k, before).argmax())
            want.append(ids[before])
            changed += before != 0
        assert found.propose(last, 99, GREEDY).tokens.tolist() == want
        assert found.propose(last, 2, GREEDY).tokens.tolist() == want[:2]
    assert changed  # else the lattice did nothing


def test_sampled_tokens_follow_the_probabilities_they_come_with(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot's are those behind the token that was drawn before it."""
    tiny, sample = kit.tiny(block_size=3, candidate_top_k=5), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    with torch.no_grad():
        block = kit.block(kit.model64(tiny), tiny, sample["hidden_states"], 3, 6)

    def exact(k: int, before: int | None) -> torch.Tensor:
        spread = (block.scores(k, before) / 2).softmax(0)
        return torch.zeros(13, dtype=torch.float64).scatter(0, torch.tensor(block.ids[k]), spread)

    sampling = Sampling(temperature=2.0, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 13)
    lattice = found.lattice(3)
    monkeypatch.setattr(found, "lattice", lambda _last: lattice)  # the same block every time
    for number in range(600):
        proposal = found.propose(3, 2, sampling)
        tokens = proposal.tokens.tolist()
        assert proposal.probs is not None
        if number < 20:
            close(proposal.probs[0], exact(0, None), terms=TERMS)
            close(proposal.probs[1], exact(1, block.ids[0].index(tokens[0])), terms=TERMS)
        counts[[0, 1], tokens] += 1
    first = exact(0, None)
    second = torch.stack([first[t] * exact(1, k) for k, t in enumerate(block.ids[0])]).sum(0)
    for seen, probs in zip(counts, (first, second), strict=True):
        can = probs > 0
        assert not seen[~can].any()
        assert ((seen - 600 * probs) ** 2 / (600 * probs))[can].sum() < 25  # 4 degrees: 1 in 20,000


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    tiny.model.bfloat16()
    tiny.frozen.bfloat16()
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, generator=torch.Generator())
        assert found.propose(3, 3, sampling).tokens.shape == (3,)
