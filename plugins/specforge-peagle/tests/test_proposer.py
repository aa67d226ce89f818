"""What is drafted is what was trained: same rows, same depths, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_peagle.proposer import PeagleProposer

from specforge_core.testing.close import close
from specforge_core.types import Sampling

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
WIDTHS = 2 * (72 + 5 * 96 + 20 + 24)


def started(kit: Any, end: int, **options: Any) -> tuple[Any, PeagleProposer, Any]:
    tiny = kit.tiny(**options)
    (sample,) = kit.samples(tiny.config, (20,))
    proposer = PeagleProposer(tiny.config, tiny.model, tiny.frozen)
    proposer.start(kit.capture(sample, 0, end))
    return tiny, proposer, sample


@pytest.mark.parametrize(
    "options", [{}, {"layer_type": "qwen3", "train_embedding": False, "draft_length": 3}], ids=str
)
def test_logits_are_those_of_training(kit: Any, options: dict[str, Any]) -> None:
    tiny, proposer, sample = started(kit, 6, **options)
    end, ids = 6, sample["input_ids"]
    weights = {name: value.detach() for name, value in kit.weights64(tiny).items()}
    for accepted in (0, 3, 1, 0, 4):
        if accepted:
            proposer.accept(kit.capture(sample, end, end + accepted))
        end += accepted
        count = proposer.max_tokens
        found = proposer.logits(int(ids[end]), count)
        row, cut = end - 1, {**sample, "input_ids": ids[: end + 1]}
        want = kit.logits64(weights, tiny, cut, [(row, d) for d in range(count)])
        close(found, torch.stack([want[row, d] for d in range(count)]), terms=WIDTHS)
        tokens = proposer.propose(int(ids[end]), 99, GREEDY).tokens
        best = found.argmax(-1)
        assert tokens.tolist() == (tiny.model.d2t[best] + best).tolist()
        assert proposer.propose(int(ids[end]), 2, GREEDY).tokens.tolist() == tokens[:2].tolist()


@pytest.mark.slow
def test_sampled_tokens_follow_the_probabilities_they_come_with(kit: Any) -> None:
    tiny, proposer, _ = started(kit, 6)
    sampling = Sampling(temperature=1.5, generator=torch.Generator().manual_seed(0))
    counts, rounds = torch.zeros(3, 29), 300
    for _ in range(rounds):
        proposal = proposer.propose(3, 3, sampling)
        counts[torch.arange(3), proposal.tokens] += 1
    assert proposal.probs is not None
    close(proposal.probs.sum(-1), torch.ones(3, dtype=torch.float64), terms=29)
    assert not proposal.probs[:, ~tiny.model.t2d].any()
    want = torch.softmax(proposer.logits(3, 3) / 1.5, -1)
    close(proposal.probs[:, tiny.model.t2d], want.double(), terms=29)
    known = proposal.probs[:, tiny.model.t2d] * rounds
    chi_square = ((counts[:, tiny.model.t2d] - known) ** 2 / known).sum(-1)
    assert chi_square.max() < 45  # 16 degrees of freedom: one in 5,000


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, proposer, _ = started(kit, 6)
    tiny.model.bfloat16()
    assert proposer.propose(3, 3, GREEDY).tokens.shape == (3,)
