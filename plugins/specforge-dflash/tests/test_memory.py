"""What a step is expected to hold, against what was measured on an H100."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specforge_dflash.config import DFlashConfig, draft_shape
from specforge_dflash.memory import step_bytes
from specforge_dflash.model import DFlashModel, Frozen
from specforge_dflash.step import DFlashStep

from specforge_core.testing.case import Case
from specforge_core.testing.float8 import check_float8, saved_float8
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import TargetInfo


def test_the_case_of_the_benchmark_is_expected_within_a_tenth(qwen3_8b: TargetInfo) -> None:
    """benchmarks/step.py, D1: 8.7 GiB with weights and gradients in bfloat16."""
    config = DFlashConfig(name="dflash", num_layers=5, num_anchors=512, block_size=16)
    shape = draft_shape(config, qwen3_8b, 151935)
    with torch.device("meta"):
        weights = sum(p.numel() for p in DFlashModel(shape, "auto").parameters())
    held = 2 * (weights + 2 * 151936 * 4096)
    parts = step_bytes(config, shape, 3072, 1, 2, recompute=False)
    assert (held + sum(parts.values())) / 2**30 == pytest.approx(8.7, rel=0.1)
    again = step_bytes(config, shape, 3072, 1, 2, recompute=True)
    # of five layers one is there as a whole, of the others what they were given
    ratio = again["what the layers keep"] / parts["what the layers keep"]
    assert 0.2 < ratio < 0.4
    other = {k: v for k, v in again.items() if parts[k] != v}
    assert list(other) == ["what the layers keep"]
    assert parts["the head in float8"] == 0
    narrow = step_bytes(config, shape, 3072, 1, 2, recompute=False, float8=True)
    assert narrow["the head in float8"] == 151936 * 4096


def test_what_float8_keeps_is_counted_of_the_head_too(tmp_path: Path) -> None:
    save_toy_target(tmp_path / "target", tie_word_embeddings=False, vocab_size=272)
    options = {"name": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 8}
    case = Case.open(options, tmp_path / "target", tmp_path)
    step = case.job.strategy.train_step(case.job.run.strategy)
    assert isinstance(step, DFlashStep)
    tokens = len(case.samples[0]["hidden_states"])

    def planned() -> dict[str, int]:
        return dict(step.step_bytes(case.draft, tokens, 1, 4, recompute=False))

    before = planned()
    check_float8(case)
    after = planned()
    # each layer keeps what it does without, and makes float8 of it again
    assert saved_float8(case, case.samples[:1]) == 0
    assert after["what the layers keep"] == before["what the layers keep"]
    assert sum(after.values()) > sum(before.values())
    frozen = case.draft.frozen
    assert isinstance(frozen, Frozen)
    head = frozen.float8_head(case.draft.model)
    assert head is not None
    assert after["the head in float8"] == head.values.nbytes == 272 * 32
