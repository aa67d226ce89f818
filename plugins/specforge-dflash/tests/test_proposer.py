"""What is drafted when serving is what training computed for the same block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash.proposer import DFlashProposer

from specforge_core.testing.close import close
from specforge_core.types import Sampling, TargetCapture

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())

WIDTHS = 48 + 2 * (3 * 24 + 32 + 40 + 20) + 24  # what fc, two layers and the head sum over


def proposer(tiny: Any) -> DFlashProposer:
    return DFlashProposer(tiny.config, tiny.model, tiny.frozen)


def captured(tiny: Any, sample: Any, start: int, end: int) -> TargetCapture:
    layers = tiny.model.shape.capture_layers
    states = sample["hidden_states"][start:end].split(24, dim=-1)
    ids = sample["input_ids"][start:end]
    return TargetCapture(
        index=0,
        input_ids=ids,
        loss_mask=torch.zeros_like(ids),
        hidden_states=dict(zip(layers, states, strict=True)),
    )


@pytest.mark.parametrize("layout", ["same_position", "next_token"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"causal": True}], ids=str)
def test_cached_drafting_equals_training(kit: Any, layout: str, options: dict[str, Any]) -> None:
    tiny = kit.tiny(label_layout=layout, softcap=8.0, **options)
    sample = kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 5))
    length = 5
    for accepted in (3, 1, 0, 6):  # 0: asked again without new tokens
        if accepted:
            found.accept(captured(tiny, sample, length, length + accepted))
        length += accepted
        token = int(sample["input_ids"][length])
        got = found.block_logits(token)

        ids = torch.full((1, 1, 4), 40)
        ids[..., 0] = token
        where = torch.tensor([[length]]), torch.tensor([[0]]), torch.arange(19)[None]
        with torch.no_grad():
            slots = tiny.frozen.embed(ids.flatten(1))
            states = tiny.model(sample["hidden_states"][None], slots, *where)
            states = states[0, 0 if layout == "next_token" else 1 :]
            want = tiny.frozen.logits(states)
        assert got.shape == (found.max_tokens, 41)
        close(found.block_states(token), states, terms=WIDTHS)  # whichever is asked first
        close(got, want, terms=WIDTHS)
        assert found.propose(token, 99, GREEDY).tokens.tolist() == want.argmax(-1).tolist()


def test_a_long_text_outgrows_the_first_cache(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((700,))[0]
    step = proposer(tiny)
    step.start(captured(tiny, sample, 0, 100))
    for start in range(100, 690, 59):
        step.propose(3, 3, GREEDY)
        step.accept(captured(tiny, sample, start, start + 59))
    whole = proposer(tiny)
    whole.start(captured(tiny, sample, 0, 690))
    close(step.block_logits(3), whole.block_logits(3), terms=WIDTHS + 2 * 690)


def test_start_forgets_the_last_text(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 12))
    found.propose(3, 3, GREEDY)
    found.start(captured(tiny, sample, 0, 6))
    fresh = proposer(tiny)
    fresh.start(captured(tiny, sample, 0, 6))
    assert torch.equal(found.block_logits(3), fresh.block_logits(3))


def test_greedy_tokens_and_fewer_of_them(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    found = proposer(tiny)
    assert found.max_tokens == 3
    found.start(captured(tiny, sample, 0, 6))
    proposal = found.propose(3, 2, GREEDY)
    assert proposal.probs is None
    assert proposal.tokens.tolist() == found.block_logits(3)[:2].argmax(-1).tolist()


@pytest.mark.slow
def test_sampled_tokens_follow_the_probabilities_they_come_with(kit: Any) -> None:
    tiny, sample = kit.tiny(softcap=2.0), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 6))
    sampling = Sampling(temperature=1.5, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(3, 41)
    for _ in range(800):
        proposal = found.propose(3, 3, sampling)
        counts[torch.arange(3), proposal.tokens] += 1
    probs = proposal.probs
    assert probs is not None
    close(probs, torch.softmax(found.block_logits(3) / 1.5, -1), terms=WIDTHS)
    chi_square = ((counts - 800 * probs) ** 2 / (800 * probs)).sum(-1)
    assert chi_square.max() < 85  # 40 degrees of freedom: one in 20,000


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, sample = kit.tiny(), kit.samples((19,))[0]
    tiny.model.bfloat16()
    tiny.frozen.bfloat16()
    found = proposer(tiny)
    found.start(captured(tiny, sample, 0, 6))
    assert found.propose(3, 3, GREEDY).tokens.shape == (3,)
