"""Answers against those of the core's own engine; what this one cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from specforge_example import specforge_target_engine

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec, GenerateOptions, Prompt, TargetEngine

CPU = torch.device("cpu")


def config(target: Path, **settings: object) -> TargetConfig:
    given = {"path": str(target), "dtype": "float32", "engine": "example", **settings}
    return TargetConfig.model_validate(given)


@pytest.fixture
def engine(toy_target: Path) -> Iterator[TargetEngine]:
    found = specforge_target_engine(config(toy_target), CPU)
    assert found is not None
    yield found
    found.close()


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 256, (length,), generator=draw) for length in lengths]
    return [
        Prompt(index=i, input_ids=ids, loss_mask=torch.zeros_like(ids))
        for i, ids in enumerate(texts)
    ]


def test_greedy_answers_are_those_of_the_core_and_end_where_they_should(
    engine: TargetEngine, toy_target: Path
) -> None:
    core = TransformersEngine.load(config(toy_target, engine="transformers"), CPU)
    for eos in (frozenset[int](), frozenset(range(0, 260, 5))):
        options = GenerateOptions(max_new_tokens=12, eos=eos)
        wanted = {a.index: a for a in core.generate(prompts(3, 9, 1), options)}
        assert {a.index: a for a in engine.generate(prompts(3, 9, 1), options)} == wanted
        assert any(answer.finished for answer in wanted.values()) is bool(eos)


def test_what_is_drawn_hangs_on_seed_and_prompt_alone(engine: TargetEngine) -> None:
    def drawn(some: list[Prompt], seed: int) -> list[tuple[int, ...]]:
        options = GenerateOptions(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        return [answer.tokens for answer in engine.generate(some, options)]

    one, two = drawn(prompts(4, 7), 0)
    assert drawn(prompts(4, 7)[1:], 0) == [two]
    assert drawn(prompts(4, 7), 1) != [one, two]


def test_another_name_is_another_engine(toy_target: Path) -> None:
    assert specforge_target_engine(config(toy_target, engine="other"), CPU) is None


def test_what_it_cannot_do_is_refused_with_what_can(engine: TargetEngine, toy_target: Path) -> None:
    spec = CaptureSpec(layers=(0,), fields={})
    assert not engine.supports(spec)
    with pytest.raises(CaptureError, match=r"target\.engine=transformers"):
        list(engine.capture(prompts(3), spec))
    with pytest.raises(ConfigError, match="has no options"):
        specforge_target_engine(config(toy_target, options={"threads": 2}), CPU)
