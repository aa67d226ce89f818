"""Drafting is what training computed, with the drafted tokens in the place of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_domino.proposer import DominoProposer
from specforge_domino.step import DominoStep

from specforge_core.testing.close import close
from specforge_core.types import Proposal, Sampling

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
WIDTHS = 48 + 2 * (3 * 24 + 32 + 40 + 20) + 5 * 31 + 31 + 6 + 24


def proposer(tiny: Any) -> DominoProposer:
    return DominoProposer(tiny.config, tiny.model, tiny.frozen)


def chain64(
    kit: Any, tiny: Any, sample: Any, length: int, token: int, tokens: list[int]
) -> torch.Tensor:
    """Logits of every drafted token, given those of `tokens` before it."""
    model = kit.model64(tiny)
    states = kit.block_states(model, tiny, sample["hidden_states"], token, length)
    first = tiny.config.first_slot
    rows = [
        kit.token_logits(model, tiny, states[k + first], [token, *tokens[:k]])[1]
        for k in range(len(tokens))
    ]
    return torch.stack(rows).detach()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_layout": "same_position"},
    {"pure_draft_prefix_len": 0, "bias": True},
    {"pure_draft_prefix_len": 2, "softcap": 8.0, "scale": 3.0, "sliding_window": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_chain_feeds_on_its_own_tokens(kit: Any, options: dict[str, Any]) -> None:
    tiny, sample = kit.tiny(**options), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 5))
    length = 5
    for accepted in (3, 1, 0, 6):  # 0: asked again without new tokens
        if accepted:
            found.accept(kit.captured(sample, length, length + accepted))
        length += accepted
        tokens = found.propose(9, 99, GREEDY).tokens.tolist()
        assert len(tokens) == found.max_tokens == 4
        assert tokens == chain64(kit, tiny, sample, length, 9, tokens).argmax(-1).tolist()
        assert found.propose(9, 2, GREEDY).tokens.tolist() == tokens[:2]


def test_the_correction_changes_the_chain(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    changed = 0
    for length in range(3, 19):
        found = proposer(tiny)
        found.start(kit.captured(sample, 0, length))
        tokens = found.propose(9, 99, GREEDY).tokens.tolist()
        bare = kit.tiny()
        bare.model.embed_proj[2].weight.data.zero_()
        plain = proposer(bare)
        plain.start(kit.captured(sample, 0, length))
        other = plain.propose(9, 99, GREEDY).tokens.tolist()
        assert tokens[0] == other[0]  # never corrected
        changed += tokens != other
    assert changed > 8


@pytest.mark.slow
def test_sampled_tokens_follow_the_probabilities_they_come_with(kit: Any) -> None:
    tiny, sample = kit.tiny(softcap=2.0), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    sampling = Sampling(temperature=1.5, generator=torch.Generator().manual_seed(0))

    def drawn() -> Proposal:
        return found.propose(3, 2, sampling)

    counts, rounds = torch.zeros(2, 41), 600
    expected = torch.zeros(2, 41)
    for _ in range(rounds):
        proposal = drawn()
        assert proposal.probs is not None
        counts[torch.arange(2), proposal.tokens] += 1
        expected += proposal.probs
    chi_square = ((counts - expected) ** 2 / expected).sum(-1)
    assert chi_square.max() < 85  # 40 degrees of freedom: one in 20,000
    want = chain64(kit, tiny, sample, 6, 3, proposal.tokens.tolist())
    assert proposal.probs is not None
    close(proposal.probs, torch.softmax(want / 1.5, -1), terms=WIDTHS)


def test_simulated_acceptance_is_that_of_the_drafted_chains(kit: Any) -> None:
    """Text as the target's answer: what a greedy verification of each chain would accept."""
    tiny, sample = kit.tiny(base_loss_decay=0.2), kit.samples((19,))[0]
    sample["loss_mask"].fill_(1)
    sample["loss_mask"][0] = 0  # a target has always read something
    step, batch = DominoStep(tiny.config), kit.batch(tiny.config, [sample])
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    for _ in range(8):  # neither all wrong nor all right
        out = step(tiny.draft, batch, kit.context())
        optimizer.zero_grad()
        torch.autograd.backward(out.loss_sum / out.weight)
        optimizer.step()
    length = step(tiny.draft, batch, kit.context()).metrics["acceptance_length"]
    ids, total = sample["input_ids"].tolist(), 0
    for anchor in range(1, 18):
        found = proposer(tiny)
        found.start(kit.captured(sample, 0, anchor))
        tokens = found.propose(ids[anchor], 99, GREEDY).tokens.tolist()
        text = ids[anchor + 1 : anchor + 5]
        wrong = [x != y for x, y in zip(tokens, text, strict=False)] + [True]
        total += 1 + wrong.index(True)
    assert (float(length.num), float(length.den)) == (total, 17)
    assert 1.1 < total / 17 < 4.5


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    tiny.model.bfloat16()
    tiny.frozen.bfloat16()
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    assert found.propose(3, 3, GREEDY).tokens.shape == (3,)
