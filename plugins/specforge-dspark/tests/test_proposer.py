"""Drafting is what training computed, with the drafted tokens in the place of the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_dspark import specforge_train_step
from specforge_dspark.proposer import DSparkProposer

from specforge_core.errors import ConfigError
from specforge_core.testing.close import close
from specforge_core.types import Sampling

GREEDY = Sampling(temperature=0.0, generator=torch.Generator())
TERMS = 48 + 2 * (3 * 24 + 32 + 40 + 20) + 4 * 36 + 6 + 24


def proposer(tiny: Any) -> DSparkProposer:
    return DSparkProposer(tiny.config, tiny.model, tiny.frozen)


def chain64(
    kit: Any, tiny: Any, sample: Any, length: int, tokens: list[int]
) -> tuple[torch.Tensor, list[float]]:
    """Logits and confidences (logits) of every token drafted behind token 9."""
    model, first = kit.model64(tiny), tiny.config.first_slot
    states = kit.block_states(model, tiny, sample["hidden_states"], 9, length)[first:]
    states = states[: len(tokens)]
    logits, confidences = kit.chain(model, tiny, states, [9, *tokens[:-1]])
    return torch.stack(logits).detach(), [float(c.detach()) for c in confidences]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"markov_head": "gated", "label_layout": "same_position", "bias": True},
        {"markov_head": "rnn", "softcap": 2.0, "scale": 3.0, "sliding_window": 5},
    ],
    ids=str,
)
def test_a_chain_feeds_on_its_own_tokens(kit: Any, options: dict[str, Any]) -> None:
    tiny, sample = kit.tiny(**options), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 5))
    length = 5
    for accepted in (3, 0, 6):  # 0: asked again without new tokens
        if accepted:
            found.accept(kit.captured(sample, length, length + accepted))
        length += accepted
        tokens = found.propose(9, 99, GREEDY).tokens.tolist()
        assert len(tokens) == found.max_tokens == 4 - tiny.config.first_slot
        assert tokens == chain64(kit, tiny, sample, length, tokens)[0].argmax(-1).tolist()
        assert found.propose(9, 2, GREEDY).tokens.tolist() == tokens[:2]


def test_sampled_tokens_follow_the_probabilities_they_come_with(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, sample = kit.tiny(markov_head="rnn"), kit.samples((19,))[0]
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    states = found.block_states(9)
    monkeypatch.setattr(found, "block_states", lambda _last: states)  # the same block every time
    sampling = Sampling(temperature=4.0, generator=torch.Generator().manual_seed(0))
    counts, expected = torch.zeros(2, 41), torch.zeros(2, 41)
    for _ in range(600):
        proposal = found.propose(9, 2, sampling)
        assert proposal.probs is not None
        counts[torch.arange(2), proposal.tokens] += 1
        expected += proposal.probs
    assert (((counts - expected) ** 2 / expected).sum(-1)).max() < 85  # one in 20,000
    assert proposal.probs is not None
    want, _ = chain64(kit, tiny, sample, 6, proposal.tokens.tolist())
    close(proposal.probs, torch.softmax(want / 4, -1), terms=TERMS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_ends_where_it_is_probably_not_kept(kit: Any, temperature: float) -> None:
    """Before the token, which is drawn as in a whole draft."""
    sample, counts = kit.samples((19,))[0], []
    for threshold in (0.9, 0.2, 0.1, 0.05, 0.0):
        whole, short = (kit.tiny(confidence_threshold=t) for t in (0.0, threshold))
        drafts = []
        for tiny in (whole, short):
            tiny.model.confidence_head.proj.weight.data *= 0.3  # neither sure nor hopeless
            tiny.model.confidence_head.proj.bias.data.zero_()
            found = proposer(tiny)
            found.start(kit.captured(sample, 0, 9))
            generator = torch.Generator().manual_seed(0)
            sampling = Sampling(temperature=temperature, generator=generator)
            drafts.append(found.propose(9, 99, sampling).tokens.tolist())
        _, confidences = chain64(kit, whole, sample, 9, drafts[0])
        survival = torch.tensor(confidences, dtype=torch.float64).sigmoid().cumprod(0)
        counts.append(max(1, int((survival >= threshold).sum())))
        assert drafts[1] == drafts[0][: counts[-1]]
    assert counts == sorted(counts)
    assert {1, 4} < set(counts)


def test_confidences_are_recorded_with_what_was_kept(kit: Any, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    tiny = kit.tiny(record_confidence=record, confidence_threshold=0.9)
    sample = kit.samples((19,))[0]
    found = proposer(tiny)
    for _ in range(2):  # the first answer is eval's warm-up
        found.start(kit.captured(sample, 0, 5))
        tokens = found.propose(9, 99, GREEDY).tokens.tolist()
        assert len(tokens) == 4  # whole drafts are recorded
        found.accept(kit.captured(sample, 5, 8))  # the known token, and two that were drafted
    found.propose(9, 2, GREEDY)  # a part of a draft is not
    found.accept(kit.captured(sample, 8, 9))
    (row,) = (json.loads(line) for line in record.read_text().splitlines())
    assert row["accepted"] == 2
    want = chain64(kit, tiny, sample, 5, tokens)[1]
    close(torch.tensor(row["logits"]), torch.tensor(want), terms=TERMS)


def test_calibrated_confidences_say_where_a_draft_ends(kit: Any, tmp_path: Path) -> None:
    """A temperature of 10, all that the grid has, turns sure confidences into doubts."""
    record = tmp_path / "record.jsonl"
    row = json.dumps({"logits": [5.0] * 4, "accepted": 2}) + "\n"
    record.write_text(row + json.dumps({"logits": [5.0] * 4, "accepted": 0}) + "\n")
    sample = kit.samples((19,))[0]
    counts = []
    for options in ({}, {"calibration": record}):
        tiny = kit.tiny(confidence_threshold=0.5, **options)
        tiny.model.confidence_head.proj.weight.data.zero_()
        tiny.model.confidence_head.proj.bias.data.fill_(3.0)  # 0.953, at temperature 10 0.574
        found = proposer(tiny)
        found.start(kit.captured(sample, 0, 5))
        counts.append(len(found.propose(9, 99, GREEDY).tokens))
    assert counts == [4, 1]


def test_drafting_works_in_bfloat16(kit: Any) -> None:
    tiny, sample = kit.tiny(markov_head="gated"), kit.samples((19,))[0]
    tiny.model.bfloat16()
    tiny.frozen.bfloat16()
    found = proposer(tiny)
    found.start(kit.captured(sample, 0, 6))
    assert found.propose(3, 3, GREEDY).tokens.shape == (3,)


def test_a_training_records_nothing(kit: Any, tmp_path: Path) -> None:
    """Its evaluations are of one draft after the other: temperatures would fit none of them."""
    with pytest.raises(ConfigError, match=r"one draft.*strategy\.record_confidence=null"):
        specforge_train_step(kit.tiny(record_confidence=tmp_path / "record.jsonl").config)
