"""What a target is told of before it runs: its config, dtype, options, and what is no target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specforge_core.config import TargetConfig
from specforge_core.devices import pick_device
from specforge_core.errors import ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.info import load_target_info

from .small import CPU, SHAPE


def test_info_reads_no_weights(llama: TargetConfig, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((Path(llama.path) / "config.json").read_bytes())
    info = load_target_info(TargetConfig(path=str(tmp_path)))
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (32, 5, 97)
    assert info.revision is None
    assert info.config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtype_auto_is_the_checkpoints_own(
    llama: TargetConfig,
    tmp_path: Path,
    dtype: Any,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("specforge_core.cpu.has_fast_bfloat16", lambda: True)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), dtype=dtype), CPU)
    assert engine.model.dtype == expected


def test_a_missing_target_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"target.path 'no/such-model' cannot be loaded: .*Try:"):
        load_target_info(TargetConfig(path="no/such-model"))


def test_a_directory_without_a_model_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json: it is not a saved model"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_an_unknown_architecture_is_a_config_error(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no_such_type"):
        load_target_info(TargetConfig(path=str(tmp_path)))


@pytest.mark.parametrize("config", [transformers.T5Config(), transformers.ViTConfig()])
def test_a_model_that_is_no_causal_decoder_is_a_config_error(config: Any, tmp_path: Path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{config.model_type}.*Choose another target.path"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_a_bidirectional_decoder_is_a_config_error(tmp_path: Path):
    config = transformers.Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="states depend on later tokens"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_a_checkpoint_that_lacks_weights_is_a_config_error(llama: TargetConfig, tmp_path: Path):
    for file in Path(llama.path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of its weights, such as model\.layers\.1\.mlp"):
        TransformersEngine.load(TargetConfig(path=str(tmp_path)), CPU)


def test_options_reach_transformers(llama: TargetConfig) -> None:
    eager = llama.model_copy(update={"options": {"attn_implementation": "eager"}})
    assert TransformersEngine.load(eager, CPU).model.config._attn_implementation == "eager"
    wrong = llama.model_copy(update={"options": {"attn_implementation": "no_such"}})
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no_such"):
        TransformersEngine.load(wrong, CPU)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_config_error(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"target\.device '{device}' cannot be used: .*auto"):
        pick_device(device, "target.device")
