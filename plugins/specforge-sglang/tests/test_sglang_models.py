"""Other models and settings of SGLang: captured right, or refused.  An engine for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.engine import SGLangEngine
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.types import CaptureSpec

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 512,
}
SPEC = CaptureSpec(
    layers=(-1, 0, 2, 3), final="post_norm", fields={}, next_tokens=True, logsumexp=True
)


def check(path: Path, python: str, prompts: Any, same: Any, **options: Any) -> None:
    """Compare SGLang's states with those of transformers."""
    asked = prompts(5, 40, 100)
    chosen = {"python": python, **options}
    made = SGLangEngine.load(
        TargetConfig(path=str(path), engine="sglang", device="cpu", options=chosen), CPU
    )
    try:
        found = list(made.capture(asked, SPEC))
    finally:
        made.close()
    reference = TransformersEngine.load(TargetConfig(path=str(path), device="cpu"), CPU)
    same(found, list(reference.capture(asked, SPEC)))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=32)).save_pretrained(path)
    return path


def test_gemma_3_is_captured_right_or_refused(
    sglang_version: str, sglang_python: str, gemma3: Path, prompts: Any, same: Any
) -> None:
    if sglang_version == "0.5.14":
        check(gemma3, sglang_python, prompts, same)
        return
    # it hands out a layer's output without what went around the layer
    with pytest.raises(CaptureError, match="layer 0 of Gemma3ForCausalLM is not that layer's out"):
        check(gemma3, sglang_python, prompts, same)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(path)
    return path


@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="ranks of SGLang look for the GPU that torch is built for; needs a CPU build of torch",
)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each rank")
def test_tensor_parallel_ranks_capture_once(
    oldest_sglang_python: str, qwen3: Path, prompts: Any, same: Any
) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    server_args = {"tp_size": 2}
    check(qwen3, oldest_sglang_python, prompts, same, server_args=server_args, env=cores)
