"""What a step is expected to hold, against what was measured on an H100."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specforge_eagle3.config import Eagle3Config, draft_shape
from specforge_eagle3.memory import step_bytes
from specforge_eagle3.model import Eagle3Model
from specforge_eagle3.step import Eagle3Step

from specforge_core.float8 import to_float8
from specforge_core.testing.case import CPU, Case
from specforge_core.testing.float8 import saved_float8
from specforge_core.types import TargetInfo


@pytest.mark.parametrize(("trained", "measured"), [(True, 5.3), (False, 4.8)])
def test_the_case_of_the_benchmark_is_expected_within_a_tenth(
    qwen3_8b: TargetInfo, trained: bool, measured: float
) -> None:
    """benchmarks/step.py, E1: GiB with weights and gradients in bfloat16."""
    config = Eagle3Config(name="eagle3", steps=7, draft_vocab_size=32000, train_head=trained)
    shape = draft_shape(config, qwen3_8b)
    with torch.device("meta"):
        model = Eagle3Model(shape, config)
    held = 2 * (sum(p.numel() for p in model.parameters()) + 151936 * 4096)
    parts = step_bytes(config, shape, 2048, 2, recompute=False)
    assert (held + sum(parts.values())) / 2**30 == pytest.approx(measured, rel=0.1)
    again = step_bytes(config, shape, 2048, 2, recompute=True)
    assert sum(again.values()) < sum(parts.values())


def test_what_float8_keeps_is_counted(toy_target: Path, tmp_path: Path) -> None:
    options = {"name": "eagle3", "layers": [0, 2, 4], "draft_vocab_size": 96, "steps": 3}
    case = Case.open(options, toy_target, tmp_path)
    step = case.job.strategy.train_step(case.job.run.strategy)
    assert isinstance(step, Eagle3Step)
    tokens = len(case.samples[0]["hidden_states"])
    before = step.step_bytes(case.draft, tokens, 1, 4, recompute=False)
    to_float8(case.draft, CPU)
    after = step.step_bytes(case.draft, tokens, 1, 4, recompute=False)
    # of weights, for all steps, what gradients read
    saved = saved_float8(case, case.samples[:1])
    assert before["the weights in float8"] == 0
    assert after["the weights in float8"] == saved
