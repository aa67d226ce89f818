"""Targets whose files say more, or other things, than what would be run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.info import load_target_info

from .. import families

CPU = torch.device("cpu")


@pytest.fixture
def target(toy_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_target, tmp_path / "target"))


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, r"rope_type 'spiral' in its config\.json"),
        ({"rope_type": 3, "rope_theta": 1e4}, "rope_type 3 in its"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}, r"Correct its config\.json"),
    ],
)
def test_a_rope_that_cannot_be(target: Path, rope: dict[str, Any], said: str) -> None:
    config = json.loads((target / "config.json").read_text())
    config.pop("rope_theta", None)
    (target / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ConfigError, match=said) as error:
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)
    assert "hf auth login" not in str(error.value)


def test_more_layers_than_the_config_says(target: Path) -> None:
    """Those of a multi-token predictor stand behind the last one, too, and are let alone."""
    stored = load_file(target / "model.safetensors")
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    first = {name: value for name, value in stored.items() if ".layers.0." in name}
    more = {name.replace(".0.", f".{layers}."): value.clone() for name, value in first.items()}
    save_file(stored | more, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"weights of more layers \(model\.layers\.{layers}\)"):
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)
    own = {f"model.layers.{layers}.eh_proj.weight": torch.zeros(2, 2)}
    save_file(stored | more | own, target / "model.safetensors", {"format": "pt"})
    TransformersEngine.load(TargetConfig(path=str(target)), CPU).close()


@pytest.mark.parametrize("kept", [(), ("config.json", "tokenizer.json", "tokenizer_config.json")])
def test_weights_for_another_program(target: Path, kept: tuple[str, ...]) -> None:
    for file in target.iterdir():
        if file.name not in kept:
            file.unlink()
    (target / "model-q4.gguf").write_bytes(b"GGUF")
    for path in (target, target / "model-q4.gguf"):
        with pytest.raises(ConfigError, match="holds weights in GGUF, which are not read"):
            TransformersEngine.load(TargetConfig(path=str(path)), CPU)


def test_an_adapter_beside_a_model(target: Path) -> None:
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"an adapter beside its weights.*merge_and_unload"):
        load_target_info(TargetConfig(path=str(target)))


def test_a_config_with_which_the_model_cannot_be_run(tmp_path: Path) -> None:
    families.save("qwen2_5_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 9]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"cannot be run: RuntimeError: .*Correct its config\.json"
    ):
        TransformersEngine.load(TargetConfig(path=str(tmp_path)), CPU)
