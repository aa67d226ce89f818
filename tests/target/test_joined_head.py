"""One matrix is the target, whatever its head does: a bias, a scale, a softcap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from specforge_core.config import TargetConfig
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import Head, widen
from specforge_core.target.info import load_target_info
from specforge_core.types import CaptureSpec, Prompt

HEADS = {
    "Phi": {},  # a bias
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("family", HEADS)
def test_the_joined_head_of_widened_states_gives_the_targets_logits(
    family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**sizes, **ends, **HEADS[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    target = TargetConfig(path=str(tmp_path), device="cpu", dtype="float32")
    engine = TransformersEngine.load(target, torch.device("cpu"))
    ids = torch.arange(3, 20)
    spec = CaptureSpec(layers=(), final="post_norm", fields={})
    (capture,) = engine.capture([Prompt(index=0, input_ids=ids, loss_mask=ids)], spec)
    joined = Head.load(load_target_info(target)).joined()
    assert capture.final is not None
    assert joined.shape[1] == (40 if family == "Phi" else 32)
    found = widen(capture.final, joined.shape[1]) @ joined.t()
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
