"""Targets whose files or options are wrong: one error that names the target."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.config import TargetConfig
from specforge_core.data.ends import end_tokens
from specforge_core.errors import CaptureError, ConfigError, DataError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.fingerprint import target_fingerprint
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.target.weights import load_target_tensors

DEEP = "[" * 100_000
CPU = torch.device("cpu")


@pytest.fixture
def target(toy_target: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_target, tmp_path / "target")


def read(path: str) -> None:
    config = TargetConfig(path=path)
    load_target_info(config)
    load_tokenizer(config)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", ""),
        ("tokenizer.json", DEEP),
        ("tokenizer.json", '{"model": {"type": "Absent"}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"type": "Absent"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "3"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", DEEP),
    ],
)
def test_a_damaged_tokenizer(target: Path, file: str, text: str) -> None:
    (target / file).write_text(text)
    with pytest.raises(DataError, match="has no tokenizer that can be loaded: ") as error:
        load_tokenizer(TargetConfig(path=str(target)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", DEEP, '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "many"}'],
)
def test_a_damaged_config(target: Path, text: str) -> None:
    (target / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be loaded: ") as error:
        load_target_info(TargetConfig(path=str(target)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_a_clone_without_lfs(target: Path, file: str) -> None:
    (target / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises((ConfigError, DataError), match=rf"{file} is a pointer .* git lfs pull, in"):
        read(str(target))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/target", "'/no/such/target' is no folder here. Try: target.path=DIRECTORY"),
        ("models/of/mine", "'models/of/mine' is no folder here"),
        ("./absent", "'./absent' is no folder here"),
        ("config.json", "config.json' is a file. Try: target.path=DIRECTORY_OF_A_MODEL"),
        (".", "has no config.json: it is not a saved model"),
    ],
)
@pytest.mark.parametrize("what", [load_target_info, load_tokenizer])
def test_places_that_hold_no_target(
    target: Path, path: str, message: str, what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)
    if path == "config.json":
        path = str(target / path)
    with pytest.raises((ConfigError, DataError)) as error:
        what(TargetConfig(path=path))
    assert message in str(error.value)
    assert "hf auth login" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("what", [load_target_info, load_tokenizer])
def test_a_pipe_beside_a_target_is_not_waited_for(target: Path, file: str, what: Any) -> None:
    (target / file).unlink()
    os.mkfifo(target / file)
    with pytest.raises((ConfigError, DataError), match=f"{file} is no file, and would be waited"):
        what(TargetConfig(path=str(target)))


def test_code_of_a_tokenizer_is_run_with_leave_alone(target: Path) -> None:
    """Every loader says which option gives leave: checkpoints and exports do not hold it."""
    (target / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    said = json.loads((target / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (target / "tokenizer_config.json").write_text(json.dumps(said))
    trusted = TargetConfig(path=str(target), trust_remote_code=True)
    assert type(load_tokenizer(trusted)).__name__ == "Own"
    with pytest.raises(DataError, match=r"code of its own.*Try: target\.trust_remote_code=true"):
        load_tokenizer(TargetConfig(path=str(target)))


@pytest.mark.parametrize(
    "said", [None, {"quant_method": "fp8", "activation_scheme": "dynamic"}], ids=["plain", "fp8"]
)
def test_packed_weights_are_named_with_their_shapes(target: Path, said: Any) -> None:
    """Two values of four bits in a byte, as NVFP4 is kept."""
    weights = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = weights[name].shape
    weights[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    extra = {} if said is None else {"quantization_config": said}
    (target / "config.json").write_text(json.dumps(config | extra))
    with pytest.raises(ConfigError, match="unquantised checkpoint") as error:
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)
    message = str(error.value)
    assert "hf auth login" not in message
    if said is not None and "shapes cannot be multiplied" in message:
        return  # transformers 5.17 does not tell of shapes in quantised checkpoints
    assert f"{name} of shape [{rows}, {columns // 2}]" in message
    assert f"needs [{rows}, {columns}]; 1 of its tensors do not fit" in message


def test_cut_weights(target: Path) -> None:
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CaptureError, match=r"model\.safetensors is damaged, or its download did"):
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "target.options.dtype is not for the engine transformers"),
        ({"output_loading_info": False}, "target.options.output_loading_info is not for"),
        ({"target": 1}, "target.options.target is not for"),
        ({"attn_implementation": "2024-01-01"}, "cannot be loaded: "),
        ({"attn_implementation": 3}, "cannot be loaded: "),
        ({"device_map": [1]}, "cannot be loaded: "),
        ({"no_such_option": 1}, "cannot be loaded: "),
    ],
)
def test_options_that_transformers_cannot_take(
    target: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEngine.load(TargetConfig(path=str(target), options=options), CPU)


def test_a_config_with_a_huge_number_of_layers_is_read_for_its_sizes(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 64}))
    assert load_target_info(TargetConfig(path=str(target))).num_layers == 64


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("hidden_size", 0),
        ("hidden_size", 10**12),
        ("vocab_size", -1),
        ("vocab_size", 10**12),
    ],
)
def test_sizes_that_no_model_has(target: Path, name: str, size: int) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {name: size}))
    with pytest.raises(ConfigError, match=f"has {name} {size} in its config.json"):
        load_target_info(TargetConfig(path=str(target)))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "it has no weight_map"),
        ("[]", "it holds no object"),
        ('{"weight_map": []}', "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": 5}}', "5 is no file beside it"),
        ('{"weight_map": {"a": ""}}', "'' is no file beside it"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "'../a.safetensors' is no file beside it"),
        ('{"weight_map": {"a": "b/../../a"}}', "is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "'/etc/passwd' is no file beside it"),
        ('{"weight_map": {"a": "a\\u0000"}}', "is no file beside it"),
        ('{"weight_map": {"a": "\\ud800"}}', "is no file beside it"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        (DEEP, "it is nested too deeply"),
    ],
)
def test_a_damaged_index(target: Path, text: str, why: str) -> None:
    (target / "model.safetensors").rename(target / "model-00001-of-00001.safetensors")
    (target / "model.safetensors.index.json").write_text(text)
    info = load_target_info(TargetConfig(path=str(target)))
    for read in (
        lambda: target_fingerprint(info),
        lambda: TransformersEngine.load(TargetConfig(path=str(target)), CPU),
    ):
        with pytest.raises(CaptureError, match=r"index\.json is damaged: ") as error:
            read()
        assert why in str(error.value)


def test_an_index_beside_a_whole_file_is_not_what_is_loaded(target: Path) -> None:
    info = load_target_info(TargetConfig(path=str(target)))
    before = target_fingerprint(info)
    (target / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    assert target_fingerprint(info) == before
    TransformersEngine.load(TargetConfig(path=str(target)), CPU).close()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_that_stand_for_nothing(target: Path, dtype: torch.dtype) -> None:
    path = target / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"has {name} in whole numbers"):
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)


@pytest.mark.parametrize("inside", ["q_proj.lora_A", "q_proj.base_layer", "q_proj.lora_A.default"])
def test_tensors_of_an_adapter_that_nothing_reads(target: Path, inside: str) -> None:
    path = target / "model.safetensors"
    name = f"model.layers.1.self_attn.{inside}.weight"
    save_file(load_file(path) | {name: torch.ones(4, 32)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not use beside .*(lora|base_layer)") as error:
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)
    assert "merge it into the weights" in str(error.value)


def test_an_adapter_alone_is_no_target(target: Path) -> None:
    (target / "config.json").rename(target / "adapter_config.json")
    with pytest.raises(ConfigError, match="is an adapter without its model"):
        load_target_info(TargetConfig(path=str(target)))


def test_more_rows_than_the_vocabulary(target: Path) -> None:
    path = target / "model.safetensors"
    weights = load_file(path)
    name = "model.embed_tokens.weight"
    rows = len(weights[name])
    weights[name] = torch.cat([weights[name], torch.zeros(4, 32)])
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{rows + 4} rows, where the vocab_size .* is {rows}"):
        TransformersEngine.load(TargetConfig(path=str(target)), CPU)


def test_weights_of_64_bits_are_a_targets_too(target: Path) -> None:
    path = target / "model.safetensors"
    wide = {name: value.double() for name, value in load_file(path).items()}
    save_file(wide, path, {"format": "pt"})
    info = load_target_info(TargetConfig(path=str(target)))
    (head,) = load_target_tensors(info, ("lm_head",)).values()
    assert head.dtype == torch.float32


@pytest.mark.parametrize("text", ["[", "[]", DEEP, "3", ""])
def test_a_damaged_generation_config(target: Path, text: str) -> None:
    (target / "generation_config.json").write_text(text)
    config = TargetConfig(path=str(target))
    tokenizer, info = load_tokenizer(config), load_target_info(config)
    with pytest.raises(ConfigError, match=r"generation_config\.json is damaged: "):
        end_tokens(info, tokenizer)
