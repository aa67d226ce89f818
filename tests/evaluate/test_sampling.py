"""The acceptance rule, checked against the target's exact distribution.

Counts are compared by a chi-square statistic.  If the rule is right it exceeds
df + 2 sqrt(df x) + 2x with probability at most exp(-x) (Laurent and Massart
2000); x = 14 is one false alarm in a million, and the seeds are fixed anyway.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_core.errors import PluginError
from specforge_core.evaluate import decode, sampling
from specforge_core.evaluate.decode import Limits, generate, generate_plain
from specforge_core.evaluate.sampling import Verdict, check_proposal, draw, probabilities
from specforge_core.types import CaptureSpec, Proposal, Sampling, TargetCapture

VOCAB = 5
LN_FALSE_ALARM = 14.0

Rule = Callable[[Tensor, Proposal, Sampling], Verdict]


def excess(counts: Mapping[tuple[int, ...], int], exact: Mapping[tuple[int, ...], float]) -> float:
    """Return the chi-square statistic over its bound: above 1 the rule is wrong."""
    total = sum(counts.values())
    cells: list[tuple[float, float]] = []
    rare = (0.0, 0.0)
    for outcome, probability in exact.items():
        cell = (float(counts.get(outcome, 0)), total * probability)
        if cell[1] < 5:  # too few for the statistic: pooled
            rare = (rare[0] + cell[0], rare[1] + cell[1])
        else:
            cells.append(cell)
    cells += [rare] if rare[1] else []
    assert sum(observed for observed, _ in cells) == total, "an outcome the target never yields"
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    df = len(cells) - 1
    bound = df + 2 * math.sqrt(df * LN_FALSE_ALARM) + 2 * LN_FALSE_ALARM
    return statistic / bound


def always_accept(logits: Tensor, proposal: Proposal, sampling: Sampling) -> Verdict:
    last = draw(probabilities(logits[-1], sampling.temperature), sampling.generator)
    return Verdict(len(proposal.tokens), last)


def replace_from_target(logits: Tensor, proposal: Proposal, sampling_: Sampling) -> Verdict:
    """The right acceptance, but a rejected token is replaced by a draw from p, not p - q."""
    verdict = sampling.verify_chain(logits, proposal, sampling_)
    p = probabilities(logits[verdict.accepted], sampling_.temperature)
    return Verdict(verdict.accepted, draw(p, sampling_.generator))


# ---- the rule itself --------------------------------------------------------


def one_position(rule: Rule, drawn: bool, rounds: int = 6000) -> float:
    """Verify one drafted token many times; return the excess of the first emitted one."""
    torch.manual_seed(1)
    logits = torch.randn(2, VOCAB) * 1.5
    q = probabilities(torch.randn(VOCAB) * 1.5, 0.8)
    settings = Sampling(temperature=0.8, generator=torch.Generator().manual_seed(3))
    p = probabilities(logits, 0.8)[0]
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(rounds):
        token = draw(q, settings.generator) if drawn else int(q.argmax())
        proposal = Proposal(tokens=torch.tensor([token]), probs=q[None] if drawn else None)
        verdict = rule(logits, proposal, settings)
        counts[(token if verdict.accepted else verdict.next_token,)] += 1
    return excess(counts, {(i,): float(p[i]) for i in range(VOCAB)})


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [True, False])
def test_the_emitted_token_follows_the_target(drawn: bool) -> None:
    assert one_position(sampling.verify_chain, drawn) < 1


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("wrong", [always_accept, replace_from_target])
def test_a_wrong_rule_is_noticed(wrong: Rule, drawn: bool) -> None:
    assert one_position(wrong, drawn) > 2


def test_a_draft_from_the_targets_own_distribution_always_stays() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB)
    settings = Sampling(temperature=0.7, generator=torch.Generator().manual_seed(0))
    probs = probabilities(logits, 0.7)[:3]
    for _ in range(200):
        tokens = torch.tensor([draw(row, settings.generator) for row in probs])
        assert (
            sampling.verify_chain(logits, Proposal(tokens=tokens, probs=probs), settings).accepted
            == 3
        )


def test_a_token_the_target_excludes_never_stays() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    settings = Sampling(temperature=1.0, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        verdict = sampling.verify_chain(
            logits, Proposal(tokens=torch.tensor([1]), probs=None), settings
        )
        assert verdict.accepted == 0
        assert verdict.next_token in (0, 2)


def test_acceptance_has_probability_min_one_p_over_q() -> None:
    p, q = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    settings = Sampling(temperature=1.0, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([p.log(), torch.zeros(2)])
    rounds = 4000
    stays = sum(
        sampling.verify_chain(
            logits, Proposal(tokens=torch.tensor([0]), probs=q[None]), settings
        ).accepted
        for _ in range(rounds)
    )
    # Hoeffding: off by more than this with probability 2 exp(-2 * 14) at most
    assert abs(stays / rounds - 0.5) < math.sqrt(LN_FALSE_ALARM / rounds)


def test_greedy_keeps_the_prefix_the_target_would_choose() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 0]), VOCAB).float()
    greedy = Sampling(temperature=0.0, generator=torch.Generator())

    def verify(tokens: Sequence[int]) -> Verdict:
        drafted = torch.tensor(tokens, dtype=torch.long)
        return sampling.verify_chain(
            logits[: len(tokens) + 1], Proposal(tokens=drafted, probs=None), greedy
        )

    assert verify([3, 1, 4]) == Verdict(3, 0)
    assert verify([3, 2, 4]) == Verdict(1, 1)  # right again behind an error does not count
    assert verify([0, 1, 4]) == Verdict(0, 3)
    assert verify([]) == Verdict(0, 3)


def test_drawing_follows_the_weights_and_never_yields_a_zero() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = Counter((draw(weights, generator),) for _ in range(4000))
    assert set(counts) == {(1,), (3,)}
    assert excess(counts, {(1,): 0.25, (3,): 0.75}) < 1


# ---- whole answers ----------------------------------------------------------


class Drawn:
    """Drafts from fixed distributions that differ from the target's."""

    max_tokens = 2

    def __init__(self, *, with_probs: bool) -> None:
        torch.manual_seed(7)
        self.q = probabilities(torch.randn(2, VOCAB), 0.5)
        self.with_probs = with_probs

    def start(self, prefix: TargetCapture) -> None: ...

    def accept(self, accepted: TargetCapture) -> None: ...

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        if not self.with_probs:
            return Proposal(tokens=self.q.argmax(-1)[:max_tokens], probs=None)
        tokens = [draw(row, sampling.generator) for row in self.q[:max_tokens]]
        return Proposal(tokens=torch.tensor(tokens), probs=self.q[:max_tokens])


TEMPERATURE = 1.0
PROMPT = (1, 3, 2)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=1.0,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def exact_distribution(model: LlamaForCausalLM) -> dict[tuple[int, ...], float]:
    """Return the probability of each answer of three tokens."""
    answers = list(itertools.product(range(VOCAB), repeat=3))
    ids = torch.tensor([[*PROMPT, *answer] for answer in answers])
    with torch.no_grad():
        p = probabilities(model(input_ids=ids).logits, TEMPERATURE)
    place = len(PROMPT) - 1
    parts = [p[range(len(ids)), place + i, ids[:, place + i + 1]] for i in range(3)]
    return dict(zip(answers, torch.stack(parts).prod(0).tolist(), strict=True))


def answers(model: LlamaForCausalLM, *, with_probs: bool, count: int = 1000) -> float:
    limits = Limits(3, frozenset())
    settings = Sampling(temperature=TEMPERATURE, generator=torch.Generator().manual_seed(11))
    drafter = Drawn(with_probs=with_probs)
    spec = CaptureSpec(layers=(0,), fields={})
    counts = Counter(
        generate(model, drafter, spec, PROMPT, limits, settings).tokens for _ in range(count)
    )
    return excess(counts, exact_distribution(model))


@pytest.mark.slow
@pytest.mark.parametrize("with_probs", [True, False])
def test_answers_follow_the_targets_distribution(model: LlamaForCausalLM, with_probs: bool) -> None:
    assert answers(model, with_probs=with_probs) < 1


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [always_accept, replace_from_target])
def test_a_wrong_rule_shows_in_answers(
    model: LlamaForCausalLM, wrong: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "verify_chain", wrong)
    assert answers(model, with_probs=True) > 1.5


@pytest.mark.slow
def test_the_target_alone_follows_its_distribution(model: LlamaForCausalLM) -> None:
    settings = Sampling(temperature=TEMPERATURE, generator=torch.Generator().manual_seed(2))
    counts = Counter(
        generate_plain(model, PROMPT, Limits(3, frozenset()), settings).tokens for _ in range(1000)
    )
    assert excess(counts, exact_distribution(model)) < 1


# ---- what proposers get wrong ----------------------------------------------


def uniform(rows: int) -> Tensor:
    return torch.full((rows, VOCAB), 1 / VOCAB)


@pytest.mark.parametrize(
    ("tokens", "probs", "message"),
    [
        ([1, 2, 3], None, r"drafted tokens of shape \[3\] when asked for at most 2"),
        ([[1, 2]], None, r"drafted tokens of shape \[1, 2\]"),
        ([1, 5], None, "drafted token 5, outside the target's vocabulary of 5"),
        ([-1], None, "drafted token -1, outside"),
        ([1, 2], uniform(1), r"probabilities of shape \[1, 5\] for 2 tokens. It must be \[2, 5\]"),
        ([1], uniform(1) * 0.9, "do not sum to 1"),
        ([1], uniform(1) * math.nan, "do not sum to 1"),
        ([1], torch.tensor([[-0.5, 0.5, 0.5, 0.5, 0.0]]), "one is negative"),
        ([1], torch.tensor([[1.0, 0, 0, 0, 0]]), "a drafted token.s is 0"),
    ],
)
def test_a_proposal_that_breaks_the_contract_is_refused(
    tokens: list[int], probs: Tensor | None, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        check_proposal(Proposal(tokens=torch.tensor(tokens), probs=probs), 2, VOCAB)


def test_good_proposals_pass() -> None:
    check_proposal(Proposal(tokens=torch.tensor([1, 2]), probs=uniform(2)), 2, VOCAB)
    check_proposal(Proposal(tokens=torch.tensor([1, 2]), probs=uniform(2).bfloat16()), 2, VOCAB)
    check_proposal(Proposal(tokens=torch.tensor([], dtype=torch.long), probs=None), 2, VOCAB)
