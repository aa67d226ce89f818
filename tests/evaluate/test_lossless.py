from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_core.evaluate.decode import Limits, generate_plain
from specforge_core.evaluate.lossless import Difference, first_difference, reference
from specforge_core.testing.close import close
from specforge_core.types import Sampling

PROMPT = [4, 9, 2]
LIMITS = Limits(12, frozenset())
GREEDY = Sampling(temperature=0.0, generator=torch.Generator())


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def test_the_reference_ignores_the_checkpoints_generation_options() -> None:
    model = tiny()
    plain = generate_plain(model, PROMPT, LIMITS, GREEDY).tokens
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=3.0
    )
    before = model.generation_config
    answer = reference(model, PROMPT, LIMITS)
    assert answer.tokens == plain
    assert answer.stats.new_tokens == 12
    assert answer.stats.tokens_per_second is not None
    assert model.generation_config is before


def test_the_reference_ends_at_any_of_several_end_of_text_tokens() -> None:
    model = tiny()
    tokens = reference(model, PROMPT, LIMITS).tokens
    eos = tokens[3]
    never = next(token for token in range(31) if token not in tokens)
    ended = reference(model, PROMPT, Limits(12, frozenset([never, eos]))).tokens
    assert ended == tokens[: tokens.index(eos) + 1]


def test_equal_answers_have_no_difference() -> None:
    assert first_difference(tiny(), PROMPT, (1, 2), [1, 2]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_token_is_a_mismatch_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    expected = reference(model, PROMPT, LIMITS).tokens
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT, *expected[:5]]])).logits[0, -1].float()
    worst = int(logits.argmin())
    ours = (*expected[:5], worst, *expected[6:])
    found = first_difference(model, PROMPT, ours, expected)
    assert found is not None
    assert (found.place, found.ours, found.expected) == (5, worst, expected[5])
    # a difference of two logits, each rounded to the model's dtype, of a model of width < 100
    close(found.gap, float(logits.max() - logits.min()), terms=1, factor=4, dtype=torch.bfloat16)
    assert not found.tie


def test_two_equal_best_logits_are_a_tie_in_bfloat16_only() -> None:
    model = tiny()
    expected = reference(model, PROMPT, LIMITS).tokens
    spare = next(token for token in range(31) if token not in (*PROMPT, *expected))
    # this row makes `spare` exactly as likely as the token chosen at place 2
    model.lm_head.weight.data[spare] = model.lm_head.weight.data[expected[2]]
    ours = (*expected[:2], spare)
    strict = first_difference(model, PROMPT, ours, expected)
    assert strict is not None
    assert (strict.gap, strict.tie) == (0.0, False)
    loose = first_difference(model.bfloat16(), PROMPT, ours, expected)
    assert loose is not None
    assert loose.tie


def test_an_answer_that_ends_early_or_late_is_a_mismatch() -> None:
    inf = float("inf")
    model = tiny().bfloat16()
    assert first_difference(model, PROMPT, (1, 2), (1, 2, 3)) == Difference(2, None, 3, inf, False)
    assert first_difference(model, PROMPT, (1, 2, 3), (1, 2)) == Difference(2, 3, None, inf, False)
