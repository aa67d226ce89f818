"""Answers of the target in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import Head
from specforge_core.target.info import load_target_info
from specforge_core.types import Generated, GenerateOptions, Prompt

from .. import families
from .small import SHAPE


def load(path: Path, vocab_size: int) -> TransformersEngine:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": vocab_size})
    model: Any = transformers.LlamaForCausalLM(config).double().eval()
    model.save_pretrained(path)
    info = load_target_info(TargetConfig(path=str(path)))
    return TransformersEngine(model, info, Head.of_model(model, info), 64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return load(tmp_path_factory.mktemp("target"), 97)


def prompts(*lengths: int, first: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (n,), generator=draw) for n in lengths]
    return [Prompt(index=first + i, input_ids=row, loss_mask=row * 0) for i, row in enumerate(rows)]


def answers(
    engine: TransformersEngine, asked: Sequence[Prompt], **options: Any
) -> dict[int, Generated]:
    found = list(engine.generate(asked, GenerateOptions(**{"max_new_tokens": 12, **options})))
    assert sorted(g.index for g in found) == sorted(p.index for p in asked)
    return {g.index: g for g in found}


ASKED = prompts(9, 4, 15, 4, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_answers_are_transformers_own(engine: TransformersEngine, batch_size: int) -> None:
    found = answers(engine, ASKED, batch_size=batch_size)
    for prompt in ASKED:
        alone = engine.model.generate(
            prompt.input_ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert list(found[prompt.index].tokens) == alone[0, len(prompt.input_ids) :].tolist()
        assert not found[prompt.index].finished


def test_answers_on_both_sides_of_a_long_ropes_turn_are_those_of_each_alone(tmp_path: Path) -> None:
    families.save("phi3_longrope", tmp_path)  # whose rope is another one from 257 tokens on
    target = TargetConfig(path=str(tmp_path), dtype="float32")
    engine = TransformersEngine.load(target, torch.device("cpu"))
    asked = prompts(100, 300, 252, 200)  # the third's answer passes the turn
    found = answers(engine, asked, batch_size=8)
    for prompt in asked:
        alone = answers(engine, [prompt])
        assert found[prompt.index].tokens == alone[prompt.index].tokens


def test_what_the_models_authors_recommend_is_left_out_and_put_back(
    engine: TransformersEngine,
) -> None:
    before = answers(engine, ASKED)
    own = transformers.GenerationConfig(repetition_penalty=9.0, do_sample=True, max_new_tokens=2)
    kept, engine.model.generation_config = engine.model.generation_config, own
    try:
        assert answers(engine, ASKED) == before
        assert engine.model.generation_config is own
    finally:
        engine.model.generation_config = kept


def test_any_end_token_ends_an_answer_and_is_kept(engine: TransformersEngine) -> None:
    free = answers(engine, ASKED)
    eos = frozenset({free[0].tokens[3], free[1].tokens[5]})
    for index, found in answers(engine, ASKED, eos=eos).items():
        tokens = free[index].tokens
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        assert found.finished == (end is not None)
        assert found.tokens == (tokens if end is None else tokens[: end + 1])
    assert answers(engine, ASKED, eos=eos)[0].finished


def test_sampled_answers_depend_on_the_seed_and_the_prompt_not_on_the_batch(
    engine: TransformersEngine,
) -> None:
    sampled = {"temperature": 1.0, "top_p": 0.95}
    one = answers(engine, ASKED, **sampled, batch_size=1)
    assert answers(engine, ASKED, **sampled, batch_size=5) == one
    assert answers(engine, ASKED[::-1], **sampled, batch_size=2) == one
    assert answers(engine, ASKED[2:3], **sampled) == {2: one[2]}
    assert answers(engine, ASKED, **sampled, seed=1) != one
    same = [
        Prompt(index=i, input_ids=ASKED[0].input_ids, loss_mask=ASKED[0].loss_mask)
        for i in range(4)
    ]
    assert len({g.tokens for g in answers(engine, same, **sampled).values()}) == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_tokens_are_drawn_as_often_as_the_target_says(
    tmp_path: Path, temperature: float, top_p: float
) -> None:
    engine, draws = load(tmp_path, 9), 4000
    ids = torch.tensor([3, 7, 4])
    with torch.no_grad():
        logits = engine.model(ids[None]).logits[0, -1]
    probs, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    kept = probs.cumsum(0) - probs < top_p
    expected = torch.zeros(9, dtype=torch.float64)
    expected[order[kept]] = probs[kept] / probs[kept].sum()
    asked = [Prompt(index=i, input_ids=ids, loss_mask=ids * 0) for i in range(draws)]
    options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 1, "batch_size": 1000}
    counts = Counter(g.tokens[0] for g in answers(engine, asked, **options).values())
    assert not any(counts[token] for token in range(9) if expected[token] == 0)
    likely = [token for token in range(9) if expected[token] * draws >= 5]
    assert len(likely) >= 3
    square = sum(
        (counts[t] - draws * float(expected[t])) ** 2 / (draws * float(expected[t])) for t in likely
    )
    freedom = len(likely) - 1
    assert square < freedom + 4 * sqrt(2 * freedom)  # about one seed in a thousand fails


def test_a_token_that_the_target_lacks_is_an_error(engine: TransformersEngine) -> None:
    wrong = [Prompt(index=7, input_ids=torch.tensor([3, 97]), loss_mask=torch.zeros(2))]
    with pytest.raises(CaptureError, match="prompt 7 has token ids 3 to 97"):
        answers(engine, wrong)
