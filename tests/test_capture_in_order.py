from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specforge_core.capture.worker import capture_in_order

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec, Field, Prompt, Sample, TargetCapture, TargetEngine


class Keep:
    """Stores the token ids; skips prompts whose index is a multiple of 5."""

    spec = CaptureSpec((0,), "none", {"input_ids": Field((None,), "int64")})

    def __call__(self, capture: TargetCapture) -> Sample | None:
        return {"input_ids": capture.input_ids} if capture.index % 5 else None


def prompts(count: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (count,), generator=draw).tolist()
    rows = [torch.randint(0, 260, (n,), generator=draw) for n in lengths]
    return [Prompt(100 - i, row, row % 2) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def engine(toy_target: Path) -> TransformersEngine:
    return TransformersEngine.load(TargetConfig(path=str(toy_target), batch_tokens=64))


@pytest.mark.parametrize("window", [1, 7, 100])
def test_samples_come_in_the_prompts_order(engine: TargetEngine, window: int):
    asked = prompts(30)
    raw = [c.index for c in engine.capture(asked, Keep.spec)]
    assert raw != [p.index for p in asked]  # the engine itself goes by length
    found = list(capture_in_order(engine, Keep(), iter(asked), window))
    assert [index for index, _ in found] == [p.index for p in asked]
    for (index, sample), prompt in zip(found, asked, strict=True):
        if index % 5 == 0:
            assert sample is None
        else:
            assert sample is not None
            assert torch.equal(sample["input_ids"], prompt.input_ids)


def test_a_prompt_may_come_twice_in_a_window(engine: TargetEngine):
    asked = [*prompts(4), *prompts(4)]
    found = [index for index, _ in capture_in_order(engine, Keep(), asked, 8)]
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
        list(capture_in_order(Odd(engine, fault), Keep(), prompts(5), 5))
