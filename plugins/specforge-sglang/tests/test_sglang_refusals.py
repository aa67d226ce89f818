"""What goes wrong with SGLang itself is said, and never stored."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.engine import SGLangEngine
from transformers import Olmo2Config, Olmo2ForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.types import CaptureSpec

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def no_setter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class in SGLang cannot hand out layers."""
    path = tmp_path_factory.mktemp("olmo2")
    torch.manual_seed(0)
    config = Olmo2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        max_position_embeddings=512,
    )
    Olmo2ForCausalLM(config).save_pretrained(path)
    return path


def test_a_model_without_a_layer_setter_is_refused(
    oldest_sglang_python: str, no_setter: Path
) -> None:
    options = {"python": oldest_sglang_python}
    config = TargetConfig(path=str(no_setter), engine="sglang", device="cpu", options=options)
    with pytest.raises(CaptureError, match="Olmo2ForCausalLM cannot hand out layers"):
        SGLangEngine.load(config, CPU)


def test_a_child_that_is_killed_is_an_error_with_its_last_words(
    oldest_sglang_python: str, toy_target: Path, root: Path, prompts: Any
) -> None:
    options = {"python": oldest_sglang_python, "directory": str(root)}
    config = TargetConfig(path=str(toy_target), engine="sglang", device="cpu", options=options)
    engine = SGLangEngine.load(config, CPU)
    source = engine.capture(
        prompts(*[50] * 400), CaptureSpec(layers=(1, 2), final="post_norm", fields={})
    )
    next(source)
    (url,) = (server.client.url for server in engine.pool.servers)
    pid = serving(int(url.rsplit(":", 1)[1]))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CaptureError, match=r"SGLang ended with status -9\. Its last lines:"):
        list(source)
    engine.close()
    assert list(root.iterdir()) == []


def serving(port: int) -> int:
    """Return the process that was started with a port."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if str(port).encode() in words and b"specforge_sglang_capture" in words:
            return int(path.parent.name)
    raise AssertionError(f"no process was started with port {port}")
