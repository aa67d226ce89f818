from __future__ import annotations

import pytest
import torch

from specforge_core.cpu import use_few_threads


@pytest.mark.parametrize(
    ("gpu", "environment", "before", "expected"),
    [
        (True, None, 16, [4]),
        (True, None, 2, [2]),
        (True, "16", 16, []),
        (False, None, 16, []),
    ],
)
def test_a_gpu_leaves_few_threads_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    environment: str | None,
    before: int,
    expected: list[int],
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    use_few_threads()
    assert found == expected
