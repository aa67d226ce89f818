"""Drafted trees: verified in one run of the target, and lossless."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from specforge_core.errors import PluginError
from specforge_core.evaluate.decode import CachedTarget, Limits, generate, generate_plain
from specforge_core.evaluate.sampling import Verdict, draw, probabilities
from specforge_core.evaluate.tree import check_tree, depths, prune, verify_tree
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, Proposal, Sampling, TargetCapture

VOCAB = 37
PROMPT = [5, 17, 3, 30, 8]
SPEC = CaptureSpec(layers=(0, 2), final="post_norm", fields={})
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}

WIDTHS = 3 * (4 * 32 + 2 * 32 + 48)  # what three layers' products and attention sum over


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=request.param)).eval()


def sampling(temperature: float = 0.0, seed: int = 0) -> Sampling:
    return Sampling(temperature=temperature, generator=torch.Generator().manual_seed(seed))


class Guesser:
    """Drafts random trees, in which the answer it knows is hidden where `luck` has it."""

    max_tokens = 12

    def __init__(self, answer: list[int], luck: float) -> None:
        self.answer = answer
        self.draw = random.Random(0)
        self.luck = luck
        self.done = 1
        self.seen: list[TargetCapture] = []

    def start(self, prefix: TargetCapture) -> None:
        self.seen = [prefix]

    def accept(self, accepted: TargetCapture) -> None:
        self.seen.append(accepted)
        self.done += len(accepted.input_ids)

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        count = min(max_tokens, self.draw.randint(1, self.max_tokens))
        parents = [self.draw.randint(-1, i - 1) for i in range(count)]
        levels = depths(parents)
        tokens = []
        for level in levels:
            place = self.done + level - 1
            right = self.draw.random() < self.luck and place < len(self.answer)
            tokens.append(self.answer[place] if right else self.draw.randrange(VOCAB))
        return Proposal(tokens=torch.tensor(tokens), probs=None, parents=torch.tensor(parents))


@pytest.mark.parametrize("luck", [0.0, 0.7, 1.0])
def test_greedy_answers_are_the_targets_own(model: Any, luck: float) -> None:
    limits = Limits(40, frozenset())
    want = generate_plain(model, PROMPT, Limits(60, frozenset()), sampling()).tokens
    proposer = Guesser(list(want), luck)
    answer = generate(model, proposer, SPEC, PROMPT, limits, sampling())
    assert answer.tokens == want[:40]
    length = answer.stats.acceptance_length
    assert length is not None
    assert (length > 2) == (luck > 0.5)
    assert all(
        a <= d for a, d in zip(answer.stats.accepted_at, answer.stats.drafted_at, strict=True)
    )
    assert answer.stats.nodes > answer.stats.drafted  # levels


def test_the_proposer_sees_the_states_of_the_accepted_path(model: Any) -> None:
    want = generate_plain(model, PROMPT, Limits(60, frozenset()), sampling()).tokens
    proposer = Guesser(list(want), 0.7)
    generate(model, proposer, SPEC, PROMPT, Limits(30, frozenset()), sampling())
    ids = torch.cat([c.input_ids for c in proposer.seen])
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    states = torch.cat([c.hidden_states[0] for c in proposer.seen])
    close(states, output.hidden_states[1][0], terms=WIDTHS)
    finals = torch.cat([c.final for c in proposer.seen if c.final is not None])
    close(finals, output.hidden_states[-1][0], terms=WIDTHS)


def test_a_run_on_a_tree_gives_each_paths_own_logits(model: Any) -> None:
    tokens, parents = [7, 9, 11, 2, 30], [-1, -1, 0, 2, 1]
    paths = [[], [0], [1], [0, 2], [0, 2, 3], [1, 4]]
    with torch.no_grad():
        target = CachedTarget(model, None)
        target.run(PROMPT, keep=1)
        logits, _ = target.run([3, *tokens], 6, parents)
        for row, path in enumerate(paths):
            alone = model(torch.tensor([[*PROMPT, 3, *(tokens[i] for i in path)]])).logits[0, -1]
            close(logits[row], alone, terms=WIDTHS)


def without_replacement(q: Tensor, count: int, generator: torch.Generator) -> Proposal:
    """Siblings drawn one after the other from what is left of q."""
    tokens, probs = [], []
    for _ in range(count):
        probs.append(q)
        tokens.append(draw(q, generator))
        q = q.clone()
        q[tokens[-1]] = 0
        q = q / q.sum()
    return Proposal(
        tokens=torch.tensor(tokens), probs=torch.stack(probs), parents=torch.full((count,), -1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [True, False])
def test_the_emitted_token_follows_the_target(drawn: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    settings = Sampling(temperature=0.8, generator=torch.Generator().manual_seed(3))
    logits = torch.randn(4, 5, generator=gen) * 1.5
    p = probabilities(logits, 0.8)[0]
    q = probabilities(torch.randn(5, generator=gen), 0.8)
    rounds = 4000
    counts = torch.zeros(5)
    for _ in range(rounds):
        if drawn:
            proposal = without_replacement(q, 3, settings.generator)
        else:
            proposal = Proposal(tokens=q.topk(3).indices, probs=None, parents=torch.full((3,), -1))
        verdict = verify_tree(logits, proposal, settings)
        first = int(proposal.tokens[verdict.kept[0]]) if verdict.kept else verdict.next_token
        counts[first] += 1
    # Hoeffding: one of 5 is off by more than this with probability 10 exp(-2 * 12) at most
    assert float((counts / rounds - p).abs().max()) < math.sqrt(12 / rounds)


def test_more_siblings_are_accepted_more_often() -> None:
    gen = torch.Generator().manual_seed(1)
    settings = Sampling(temperature=1.0, generator=torch.Generator().manual_seed(3))
    logits = torch.randn(4, 8, generator=gen)
    q = probabilities(torch.randn(8, generator=gen), 1.0)
    found = []
    for count in (1, 3):
        verdicts = [
            verify_tree(logits, without_replacement(q, count, settings.generator), settings)
            for _ in range(600)
        ]
        found.append(sum(v.accepted for v in verdicts))
    assert found[1] > 1.15 * found[0]


def test_greedy_walks_down_the_branch_the_target_would_choose() -> None:
    rows = [3, 1, 4, 0, 2]  # the best token behind the last one, and behind each drafted one
    logits = torch.nn.functional.one_hot(torch.tensor(rows), 5).float()
    tree = Proposal(
        tokens=torch.tensor([2, 3, 1, 4]), probs=None, parents=torch.tensor([-1, -1, 0, 1])
    )
    assert verify_tree(logits, tree, sampling()) == Verdict(2, 2, (1, 3))
    lost = Proposal(
        tokens=torch.tensor([2, 1, 1, 4]), probs=None, parents=torch.tensor([-1, -1, 0, 1])
    )
    assert verify_tree(logits, lost, sampling()) == Verdict(0, 3, ())


def test_what_follows_an_end_of_text_is_cut() -> None:
    tree = Proposal(
        tokens=torch.tensor([2, 9, 1, 4, 6]),
        probs=torch.rand(5, 10),
        parents=torch.tensor([-1, -1, 0, 1, 2]),
    )
    assert tree.probs is not None
    cut = prune(tree, frozenset({9}))
    assert cut.tokens.tolist() == [2, 9, 1, 6]
    assert cut.parents is not None
    assert cut.probs is not None
    assert cut.parents.tolist() == [-1, -1, 0, 2]
    assert torch.equal(cut.probs, tree.probs[[0, 1, 2, 4]])


@pytest.mark.parametrize("parents", [[-1, 1], [0, -1], [-1], [-2, -1]])
def test_parents_that_come_later_are_refused(parents: list[int]) -> None:
    with pytest.raises(PluginError, match="Each must be the index of an earlier one, or -1"):
        check_tree(Proposal(tokens=torch.tensor([1, 2]), probs=None, parents=torch.tensor(parents)))


@pytest.mark.slow
def test_a_tree_on_sliding_windows_is_verified_path_by_path() -> None:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=layers)
    windowed = Gemma3ForCausalLM(config).eval()
    want = generate_plain(windowed, PROMPT, Limits(60, frozenset()), sampling()).tokens
    for luck in (0.0, 0.7, 1.0):
        proposer = Guesser(list(want), luck)
        answer = generate(windowed, proposer, SPEC, PROMPT, Limits(40, frozenset()), sampling())
        assert answer.tokens == want[:40]
        assert answer.stats.extra_runs > 0
