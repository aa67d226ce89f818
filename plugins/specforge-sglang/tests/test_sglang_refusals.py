"""What goes wrong with SGLang itself is said, and never stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specforge_sglang.engine import SGLangEngine
from transformers import Olmo2Config, Olmo2ForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError

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
