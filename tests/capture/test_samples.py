from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge_core.capture.samples import capture_in_order, check_first, refuse, told
from specforge_core.config import StrategyConfig, TargetConfig
from specforge_core.errors import CaptureError, PluginError
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import (
    CaptureSpec,
    Field,
    Generated,
    GenerateOptions,
    Problem,
    Prompt,
    Sample,
    TargetCapture,
    TargetEngine,
)

from ..captured import bare_strategy

STRATEGY = bare_strategy()


class Keep:
    """Stores the token ids; skips prompts whose index is a multiple of 5."""

    spec = CaptureSpec(layers=(0,), fields={"input_ids": Field(shape=(None,), dtype="int64")})

    def __call__(self, capture: TargetCapture) -> Sample | None:
        return {"input_ids": capture.input_ids} if capture.index % 5 else None


def test_advice_of_a_problem_goes_before_that_on_its_sample() -> None:
    with pytest.raises(CaptureError) as error:
        refuse([Problem(where="x", message="is 1. Try: y=2")], "the first", "Try: specforge verify")
    assert str(error.value) == "the first cannot be trained on:\n  x: is 1\nTry: y=2"
    assert told(["a. Try: y=2", "b. Try: y=2", "c"], "z") == ("\n  a\n  b\n  c", "Try: y=2\nz")


def prompts(count: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (count,), generator=draw).tolist()
    rows = [torch.randint(0, 260, (n,), generator=draw) for n in lengths]
    return [Prompt(index=100 - i, input_ids=row, loss_mask=row % 2) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def engine(toy_target: Path) -> TransformersEngine:
    return TransformersEngine.load(
        TargetConfig(path=str(toy_target), batch_tokens=64), torch.device("cpu")
    )


@pytest.mark.parametrize("window", [1, 7, 100])
def test_samples_come_in_the_prompts_order(engine: TargetEngine, window: int):
    asked = prompts(30)
    raw = [c.index for c in engine.capture(asked, Keep.spec)]
    assert raw != [p.index for p in asked]  # the engine itself goes by length
    found = list(capture_in_order(STRATEGY, engine, Keep(), iter(asked), window))
    assert [index for index, _ in found] == [p.index for p in asked]
    for (index, sample), prompt in zip(found, asked, strict=True):
        if index % 5 == 0:
            assert sample is None
        else:
            assert sample is not None
            assert torch.equal(sample["input_ids"], prompt.input_ids)


def test_a_prompt_may_come_twice_in_a_window(engine: TargetEngine):
    asked = [*prompts(4), *prompts(4)]
    found = [index for index, _ in capture_in_order(STRATEGY, engine, Keep(), asked, 8)]
    assert found == [p.index for p in asked]


class Odd:
    """An engine that answers wrongly."""

    def __init__(self, inner: TargetEngine, fault: str) -> None:
        self.inner, self.info, self.fault = inner, inner.info, fault

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        captures = list(self.inner.capture(prompts, spec))
        if self.fault == "forgets":
            captures = captures[1:]
        if self.fault == "repeats":
            captures.append(captures[0])
        if self.fault == "truncates":
            captures[0] = replace(captures[0], input_ids=captures[0].input_ids[:-1])
        yield from captures

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("forgets", r"gave no states for prompt \d+ and 0 more"),
        ("repeats", r"answered prompt \d+, which it was not asked"),
        ("truncates", r"answered prompt \d+, which it ran with other tokens"),
    ],
)
def test_an_engine_that_answers_wrongly_is_an_error(engine: TargetEngine, fault: str, message: str):
    with pytest.raises(CaptureError, match=message):
        list(capture_in_order(STRATEGY, Odd(engine, fault), Keep(), prompts(5), 5))


class Once:
    """An engine that must not be called while one of its iterators is under way."""

    def __init__(self, inner: TargetEngine) -> None:
        self.inner, self.info, self.busy, self.calls = inner, inner.info, False, 0

    def supports(self, spec: CaptureSpec) -> bool:
        return self.inner.supports(spec)

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        assert not self.busy, "called inside of its own iterator"
        self.busy, self.calls = True, self.calls + 1
        try:
            yield from self.inner.capture(prompts, spec)
        finally:
            self.busy = False

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        raise NotImplementedError

    def close(self) -> None: ...


def test_the_first_sample_is_checked_outside_of_the_engines_own_iterator(
    engine: TargetEngine,
) -> None:
    once = Once(engine)
    asked = [p for p in prompts(12) if p.index % 5] + prompts(1)  # 100 is skipped
    config = StrategyConfig(name="tiny")
    check_first(STRATEGY, config, once, Keep(), [*prompts(1), *asked])
    assert once.calls == 2  # the first few together, then one of them alone
    list(capture_in_order(STRATEGY, once, Keep(), asked, 3))
    assert not once.busy


def test_a_check_looks_past_prompts_that_are_skipped_but_not_without_end(
    engine: TargetEngine,
) -> None:
    once = Once(engine)
    skipped = [replace(p, index=5 * i) for i, p in enumerate(prompts(40))]
    check_first(STRATEGY, StrategyConfig(name="tiny"), once, Keep(), skipped)
    assert once.calls == 8  # and then training or capture says what it finds
    asked = [*skipped[:6], *prompts(2)]
    once.calls = 0
    check_first(STRATEGY, StrategyConfig(name="tiny"), once, Keep(), asked)
    assert once.calls == 3


def test_what_an_adapter_raises_names_its_package(engine: TargetEngine) -> None:
    class Broken(Keep):
        def __call__(self, capture: TargetCapture) -> Sample | None:
            raise KeyError("hidden")

    with pytest.raises(PluginError, match="specforge_adapter: KeyError: 'hidden'"):
        list(capture_in_order(STRATEGY, engine, Broken(), prompts(2), 2))


def test_the_spec_is_checked_before_what_a_strategy_looks_at_itself(
    engine: TargetEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Keep):
        def __call__(self, capture: TargetCapture) -> Sample | None:
            return {"ids": capture.input_ids}

    asked: list[object] = []
    strategy = bare_strategy()
    monkeypatch.setattr(type(strategy), "verify_capture", lambda *values: asked.append(values))
    with pytest.raises(CaptureError, match="'input_ids': is not in the sample"):
        check_first(strategy, StrategyConfig(name="tiny"), engine, Other(), prompts(2))
    assert not asked
