from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.info import load_target_info
from specforge_core.target.weights import (
    embedding_scale,
    load_target_tensors,
    tensor_files,
    tensor_names,
)
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, Prompt, TargetInfo

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("embed_tokens", "lm_head", "final_norm")


def save(path: Path, family: str, *, shard: str = "5GB", **extra: Any) -> TargetInfo:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                weight.normal_()  # a fresh model's norms are all alike
    model.save_pretrained(path, max_shard_size=shard)
    return load_target_info(TargetConfig(path=str(path)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "SmolLM3", "GPT2"])
def test_tensors_are_those_of_the_loaded_model(family: str, tied: bool, tmp_path: Path):
    info = save(tmp_path, family, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = load_target_tensors(info, NAMES)
    norm = getattr(model.get_decoder(), "ln_f" if family == "GPT2" else "norm")
    assert torch.equal(found["embed_tokens"], model.get_input_embeddings().weight)
    assert torch.equal(found["lm_head"], model.get_output_embeddings().weight)
    assert torch.equal(found["final_norm"], norm.weight)
    assert torch.equal(found["embed_tokens"], found["lm_head"]) == tied


def test_a_head_is_found_under_the_name_that_published_checkpoints_have(tmp_path: Path):
    info = save(tmp_path, "GPTNeoX", tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    save_file({**tensors, "embed_out.weight": head}, file, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(load_target_tensors(info, ["lm_head"])["lm_head"], head)
    assert torch.equal(model.get_output_embeddings().weight, head)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path):
    whole = save(tmp_path / "whole", "Llama", tie_word_embeddings=False)
    parts = save(tmp_path / "parts", "Llama", tie_word_embeddings=False, shard="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    found, expected = load_target_tensors(parts, NAMES), load_target_tensors(whole, NAMES)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    info = save(tmp_path, "Llama", tie_word_embeddings=False)
    assert list(load_target_tensors(info, ["final_norm"])) == ["final_norm"]


def test_a_multimodal_checkpoint_gives_its_text_models_tensors(tmp_path: Path):
    info = save(tmp_path, "Llama", tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    weights = {f"model.language_{key}": value for key, value in load_file(file).items()}
    weights["lm_head.weight"] = weights.pop("model.language_lm_head.weight")
    weights["visual.norm.weight"] = torch.zeros(8)
    weights["visual.embed_tokens.weight"] = torch.zeros(8, 8)
    save_file(weights, file)
    found = load_target_tensors(info, NAMES)
    assert torch.equal(found["final_norm"], weights["model.language_model.norm.weight"])
    assert torch.equal(found["embed_tokens"], weights["model.language_model.embed_tokens.weight"])


def test_a_missing_head_that_is_not_tied_is_an_error(tmp_path: Path):
    info = save(tmp_path, "Llama", tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file)
    with pytest.raises(CaptureError, match="no lm_head in the weights of target"):
        load_target_tensors(info, ["lm_head"])


def test_a_missing_shard_is_an_error(tmp_path: Path):
    info = save(tmp_path, "Llama", shard="20KB")
    file = tensor_names(info)["model.norm.weight"]
    (tmp_path / file).unlink()
    with pytest.raises(CaptureError, match=rf"lacks {file}.*Download it again"):
        load_target_tensors(info, ["final_norm"])
    with pytest.raises(CaptureError, match=rf"lacks {file}.*Download it again"):
        tensor_files(info)


def test_only_the_files_that_hold_what_is_asked_for_are_needed(tmp_path: Path):
    info = save(tmp_path, "Llama", shard="20KB", tie_word_embeddings=False)
    names = tensor_names(info)
    kept = {names["model.embed_tokens.weight"], names["lm_head.weight"]}
    for file in set(names.values()) - kept:
        (tmp_path / file).unlink()
    assert set(load_target_tensors(info, ["embed_tokens", "lm_head"])) == {
        "embed_tokens",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        (lambda file: file[: len(file) // 2], "is damaged, or its download did not end"),
        (lambda file: b"", "is damaged, or its download did not end"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(spoil: Any, message: str, tmp_path: Path):
    info = save(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    for use in (
        lambda: load_target_tensors(info, ["embed_tokens"]),
        lambda: tensor_files(info),
        lambda: TransformersEngine.load(TargetConfig(path=str(tmp_path), device="cpu"), CPU),
    ):
        with pytest.raises(CaptureError, match=rf"model\.safetensors {message}.*(Try|again)"):
            use()


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors would not: to it a file that it cannot open is not there."""
    info = save(tmp_path, "Llama")

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("specforge_core.documents.open_regular", denied)
    with pytest.raises(CaptureError, match=r"model\.safetensors cannot be read: Permission denied"):
        tensor_files(info)


def test_a_head_beside_a_config_that_ties_it_is_the_head_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    info = save(tmp_path, "Llama", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    own = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file({**weights, "lm_head.weight": own}, file, {"format": "pt"})
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), device="cpu"), CPU)
    assert torch.equal(engine.model.lm_head.weight, own)
    assert torch.equal(load_target_tensors(info, ["lm_head"])["lm_head"], own)
    assert "tie_word_embeddings" in capsys.readouterr().err


def test_scales_of_8_bit_weights_that_nothing_applies_are_an_error(tmp_path: Path):
    save(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight"] = weights[f"{name}.weight"].to(torch.float8_e4m3fn)
    weights[f"{name}.weight_scale"] = torch.tensor(0.01)
    weights["mtp.layers.0.weight"] = torch.zeros(3)  # nothing beside it is used
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"has 1 tensors .* {name}.weight_scale.*unquantised"):
        TransformersEngine.load(TargetConfig(path=str(tmp_path), device="cpu"), CPU)
    del weights[f"{name}.weight_scale"]
    weights[f"{name}.weight"] = weights[f"{name}.weight"].float()
    save_file(weights, file, {"format": "pt"})
    TransformersEngine.load(TargetConfig(path=str(tmp_path), device="cpu"), CPU).close()


def test_weights_of_another_format_are_an_error(tmp_path: Path):
    info = save(tmp_path, "Llama")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(CaptureError, match=r"has no model\.safetensors.*save_pretrained"):
        load_target_tensors(info, ["lm_head"])


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path):
    info = save(tmp_path, "Llama", tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(97, 16)}, file)
    with pytest.raises(CaptureError, match=r"shape \[97, 16\].*hidden size 32"):
        load_target_tensors(info, ["lm_head"])


def test_a_quantised_head_is_an_error(tmp_path: Path):
    info = save(tmp_path, "Llama", tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    head = torch.zeros(97, 32, dtype=torch.float8_e4m3fn)
    save_file({**load_file(file), "lm_head.weight": head}, file)
    with pytest.raises(CaptureError, match=r"lm_head\.weight.*quantised \(torch\.float8_e4m3fn\)"):
        load_target_tensors(info, ["lm_head"])


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Llama", {}),
        ("Gemma", {}),
        ("Gemma2", {"query_pre_attn_scalar": 8}),
        ("Gemma3Text", {"query_pre_attn_scalar": 8}),
        ("Granite", {"embedding_multiplier": 6.0}),
        ("Afmoe", {"mup_enabled": True, "num_dense_layers": 8}),
    ],
)
def test_scaled_embeddings_are_what_the_first_layer_sees(
    family: str, extra: dict[str, Any], tmp_path: Path
):
    info = save(tmp_path, family, **extra)
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), device="cpu"), CPU)
    ids = torch.tensor([3, 50, 96])
    (capture,) = engine.capture(
        [Prompt(index=0, input_ids=ids, loss_mask=ids)], CaptureSpec(layers=(-1,), fields={})
    )
    embedded = load_target_tensors(info, ["embed_tokens"])["embed_tokens"][ids]
    # a product of two numbers that were rounded
    close(capture.hidden_states[-1], embedded * embedding_scale(info), terms=1)
