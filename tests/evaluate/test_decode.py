from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specforge_core.errors import DataError, PluginError
from specforge_core.evaluate import decode
from specforge_core.evaluate.decode import Answer, Limits, generate, generate_plain
from specforge_core.evaluate.lossless import first_difference, reference
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, Proposal, Sampling, TargetCapture

VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # a random model that does not repeat one token
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,  # a tied random model repeats what it reads
}
SPEC = CaptureSpec(layers=(-1, 0, 2), final="post_norm", fields={})
PROMPT = [5, 17, 3, 44, 8, 29, 11]
WIDTHS = 3 * (4 * 32 + 2 * 64 + 48)  # what three layers' products and attention sum over


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def qwen3() -> Any:
    torch.manual_seed(2)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()


def gemma3() -> Any:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    # a window of 6: it has moved on long before an answer of 40 tokens ends
    config = Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


FAMILIES = {"llama": llama, "qwen3": qwen3, "gemma3": gemma3}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


class Scripted:
    """Drafts a known continuation, right where `right(place in the answer)` says so."""

    def __init__(
        self, continuation: Sequence[int], right: Callable[[int], bool], max_tokens: int
    ) -> None:
        self.continuation = continuation
        self.right = right
        self.max_tokens = max_tokens
        self.captures: list[TargetCapture] = []
        self.asked: list[int] = []

    def start(self, prefix: TargetCapture) -> None:
        self.captures = [prefix]

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        self.asked.append(max_tokens)
        done = sum(len(capture.input_ids) for capture in self.captures[1:]) + 1
        assert self.continuation[done - 1] == last_token
        places = range(done, min(done + max_tokens, len(self.continuation)))
        tokens = [(self.continuation[i] + (not self.right(i))) % VOCAB for i in places]
        return Proposal(tokens=torch.tensor(tokens, dtype=torch.long), probs=None)

    def accept(self, accepted: TargetCapture) -> None:
        self.captures.append(accepted)


def greedy() -> Sampling:
    return Sampling(temperature=0.0, generator=torch.Generator())


def oracle(model: Any, limits: Limits, max_tokens: int) -> Scripted:
    more = Limits(limits.max_new_tokens + 20, frozenset())
    return Scripted(reference(model, PROMPT, more).tokens, lambda _: True, max_tokens)


def run(model: Any, proposer: Scripted, limits: Limits, **options: Any) -> Answer:
    return generate(model, proposer, SPEC, PROMPT, limits, greedy(), **options)


@pytest.mark.parametrize("max_tokens", [1, 3, 7])
def test_a_draft_that_is_always_right_yields_its_length_and_one(
    model: Any, max_tokens: int
) -> None:
    limits = Limits(40, frozenset())
    answer = run(model, oracle(model, limits, max_tokens), limits)
    assert answer.tokens == reference(model, PROMPT, limits).tokens
    assert len(set(answer.tokens)) > 5
    assert answer.stats.acceptance_length == max_tokens + 1
    assert answer.stats.per_position == (1.0,) * max_tokens
    assert answer.stats.new_tokens == 40


def test_a_draft_that_is_always_wrong_yields_one(model: Any) -> None:
    limits = Limits(40, frozenset())
    proposer = oracle(model, limits, 4)
    proposer.right = lambda _: False
    answer = run(model, proposer, limits)
    assert answer.tokens == reference(model, PROMPT, limits).tokens
    assert answer.stats.acceptance_length == 1.0
    assert (answer.stats.verifications, answer.stats.accepted) == (39, 0)
    assert answer.stats.drafted_at == (39,) * 4
    assert answer.stats.nodes == answer.stats.drafted


def test_a_half_right_draft_changes_nothing_in_the_answer(model: Any) -> None:
    limits = Limits(40, frozenset())
    proposer = oracle(model, limits, 4)
    proposer.right = lambda place: place % 3 != 0
    answer = run(model, proposer, limits)
    assert answer.tokens == reference(model, PROMPT, limits).tokens
    # wrong at 3, 6, 9, ...: from place 1 every round accepts two and the target corrects the third
    assert answer.stats.acceptance_length == 3.0
    assert answer.stats.per_position == (1.0, 1.0, 0.0, 0.0)


def test_a_cache_that_is_not_rolled_back_is_noticed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode.CachedTarget, "forget", lambda self, count: None)
    limits = Limits(40, frozenset())
    expected = reference(model, PROMPT, limits).tokens
    proposer = Scripted(expected, lambda _: False, 4)
    proposer.propose = lambda last, most, sampling: Proposal(
        tokens=torch.full((most,), (last + 1) % VOCAB), probs=None
    )
    answer = run(model, proposer, limits)
    difference = first_difference(model, PROMPT, answer.tokens, expected)
    assert difference is not None
    assert not difference.tie


def test_the_target_alone_equals_generate(model: Any) -> None:
    limits = Limits(40, frozenset())
    alone = generate_plain(model, PROMPT, limits, greedy())
    assert alone.tokens == reference(model, PROMPT, limits).tokens
    assert alone.stats.verifications == 0
    assert alone.stats.tokens_per_second is not None


def test_proposers_get_the_states_of_every_verified_token_in_order(model: Any) -> None:
    limits = Limits(30, frozenset())
    proposer = oracle(model, limits, 5)
    proposer.right = lambda place: place % 4 != 0
    answer = run(model, proposer, limits)
    seen = torch.cat([capture.input_ids for capture in proposer.captures])
    text = [*PROMPT, *answer.tokens]
    count = min(len(seen), len(text))
    assert seen[:count].tolist() == text[:count]
    assert len(seen) >= len(text) - 1  # all but the last token, which has not been run
    masks = torch.cat([capture.loss_mask for capture in proposer.captures])
    assert masks.tolist() == [0] * len(PROMPT) + [1] * (len(seen) - len(PROMPT))
    with torch.no_grad():
        whole = model(input_ids=seen[None], output_hidden_states=True).hidden_states
    for layer in (-1, 0):
        found = torch.cat([capture.hidden_states[layer] for capture in proposer.captures])
        close(found, whole[layer + 1][0], terms=WIDTHS)
    finals = [capture.final for capture in proposer.captures if capture.final is not None]
    close(torch.cat(finals), whole[-1][0], terms=WIDTHS)


@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_an_answer_ends_at_an_end_of_text_token(model: Any, place: int) -> None:
    endless = Limits(40, frozenset())
    proposer = oracle(model, endless, 6)
    eos = proposer.continuation[place]
    never = next(token for token in range(VOCAB) if token not in proposer.continuation)
    limits = Limits(40, frozenset([eos, never]))
    answer = run(model, proposer, limits)
    assert answer.tokens == reference(model, PROMPT, limits).tokens
    assert len(answer.tokens) == proposer.continuation.index(eos) + 1
    # nothing behind it was counted either
    assert answer.stats.emitted == len(answer.tokens) - 1
    assert answer.stats.accepted <= answer.stats.drafted <= answer.stats.emitted


def test_the_target_never_runs_past_its_last_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(max_position_embeddings=24)
    longest = 0
    forward = decode.CachedTarget.run

    def watched(self: Any, tokens: Sequence[int], keep: int, parents: Any = None) -> Any:
        nonlocal longest
        result = forward(self, tokens, keep, parents)
        longest = max(longest, self.cache.get_seq_length())
        return result

    monkeypatch.setattr(decode.CachedTarget, "run", watched)
    limits = Limits(100, frozenset())
    expected = generate_plain(model, PROMPT, limits, greedy()).tokens
    assert len(expected) == 24 - len(PROMPT)
    proposer = Scripted((*expected, *[0] * 20), lambda place: place % 5 != 0, 6)
    assert run(model, proposer, limits).tokens == expected
    assert reference(model, PROMPT, limits).tokens == expected
    assert longest <= 24
    assert min(proposer.asked) < 6


def test_a_prompt_must_leave_room() -> None:
    model = llama(max_position_embeddings=8)
    with pytest.raises(DataError, match="a prompt of 8 tokens leaves no room in the target's 8"):
        generate_plain(model, [1] * 8, Limits(4, frozenset()), greedy())
    with pytest.raises(DataError, match="a prompt has no tokens"):
        generate_plain(model, [], Limits(4, frozenset()), greedy())


def test_a_single_token_needs_no_verification() -> None:
    model = llama()
    answer = run(model, oracle(model, Limits(1, frozenset()), 3), Limits(1, frozenset()))
    assert len(answer.tokens) == 1
    assert answer.stats.acceptance_length is None
    assert answer.stats.per_position == ()


def test_the_last_verification_counts_whole_but_is_cut_in_the_answer() -> None:
    model = llama()
    limits = Limits(7, frozenset())
    answer = run(model, oracle(model, limits, 4), limits)
    assert len(answer.tokens) == 7  # 1 from the prompt, then 5, then 1 of 5
    assert answer.stats.emitted == 10
    assert answer.stats.acceptance_length == 5.0


def test_fewer_drafted_tokens_may_be_asked_for() -> None:
    model = llama()
    limits = Limits(21, frozenset())
    answer = run(model, oracle(model, limits, 7), limits, max_draft_tokens=3)
    assert answer.stats.acceptance_length == 4.0
    assert answer.tokens == reference(model, PROMPT, limits).tokens


def test_a_draft_may_be_empty() -> None:
    model = llama()
    limits = Limits(10, frozenset())
    proposer = Scripted(reference(model, PROMPT, limits).tokens, lambda _: True, 0)
    answer = run(model, proposer, limits)
    assert answer.tokens == reference(model, PROMPT, limits).tokens
    assert answer.stats.acceptance_length == 1.0
    assert answer.stats.drafted == 0


def test_a_proposer_that_drafts_too_much_is_named() -> None:
    model = llama()
    proposer = oracle(model, Limits(9, frozenset()), 3)
    proposer.propose = lambda last, most, sampling: Proposal(
        tokens=torch.zeros(most + 1, dtype=torch.long), probs=None
    )
    with pytest.raises(
        PluginError, match=r"drafted tokens of shape \[4\] when asked for at most 3"
    ):
        run(model, proposer, Limits(9, frozenset()))
