"""Quantised checkpoints: their scales are applied, or they are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, Prompt

from .. import families
from . import packed

CPU = torch.device("cpu")
SIZE = 256
FP8 = torch.float8_e4m3fn
SHAPE = LlamaConfig(
    vocab_size=97,
    hidden_size=SIZE,
    intermediate_size=SIZE,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=64,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        }
    },
}
Quantise = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stored weight, its scales and what they mean, by blocks of 128 x 128."""
    cut = weight.view(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
    scales = cut.abs().amax((1, 3)) / 448
    wide = scales[:, None, :, None]
    stored = (cut / wide).to(FP8)
    return stored.view_as(weight), scales, (stored.float() * wide).view_as(weight)


def whole(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(FP8)
    return stored, scale, stored.float() * scale


def rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scales).to(FP8)
    return stored, scales, stored.float() * scales


def save(path: Path, quantise: Quantise, suffix: str, said: dict[str, Any] | None) -> Path:
    """Write a checkpoint with quantised layers beside one, `plain`, of what its weights mean."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE)
    stored: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.ndim != 2 or "layers" not in name:
            stored[name] = weight.clone()
            continue
        low, scale, meant = quantise(weight)
        stored |= {name: low, name.removesuffix("weight") + suffix: scale.contiguous()}
        weight.copy_(meant)
    model.save_pretrained(path / "plain")
    quantised = path / "quantised"
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "plain" / "config.json").read_text())
    extra = {} if said is None else {"quantization_config": said}
    (quantised / "config.json").write_text(json.dumps(config | extra))
    return quantised


def states(path: Path) -> Tensor:
    target = TargetConfig(path=str(path), device="cpu", dtype="float32")
    engine = TransformersEngine.load(target, CPU)
    ids = torch.arange(40)
    prompt = Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))
    spec = CaptureSpec(layers=(0,), final="post_norm", fields={})
    (capture,) = engine.capture([prompt], spec)
    engine.close()
    return torch.cat([capture.hidden_states[0], capture.final], dim=-1)  # type: ignore[list-item]


FINE = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("quantise", "suffix", "said", "package"),
    [
        (blocks, "weight_scale_inv", {**FINE, "weight_block_size": [128, 128]}, "accelerate"),
        (whole, "weight_scale_inv", {**FINE, "weight_block_size": None}, "accelerate"),
        (rows, "weight_scale", COMPRESSED, "compressed_tensors"),
    ],
    ids=["fp8 by blocks", "fp8 by tensors", "compressed-tensors"],
)
def test_scales_are_applied(
    quantise: Quantise, suffix: str, said: dict[str, Any], package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    path = save(tmp_path, quantise, suffix, said)
    found, meant = states(path), states(tmp_path / "plain")
    # weights become plain ones in bfloat16, the dtype that such checkpoints are kept in
    close(found.bfloat16(), meant.bfloat16(), terms=8 * SIZE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package
@pytest.mark.parametrize("quantise", [packed.awq, packed.gptq])
def test_four_bits_of_awq_and_gptq_are_read_by_their_package(
    quantise: Callable[[Path], dict[str, Tensor]], toy_target: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    for path in (stored, plain):
        shutil.copytree(toy_target, path)
    meant = quantise(stored)
    save_file(
        {name: weight.contiguous() for name, weight in meant.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    close(states(stored).half(), states(plain).half(), terms=8 * SIZE)  # its kernels' own dtype


def test_a_layout_that_transformers_passes_over_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = save(tmp_path, whole, "weight_scale", FINE)
    with pytest.raises(ConfigError, match=r"does not use.*_scale.*quantised \(fp8\), in another"):
        states(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_method 'modelopt' .* not read"),
        ({"quant_algo": "FP8"}, "no quant_method .* does not read"),
        ({"quant_method": "fp"}, "quant_method 'fp' .* does not read"),  # of fp8, and of no other
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            r"quantised \(gptq\), .*optimum.* Try: pip install gptqmodel optimum",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            r"quantised \(awq\), .*gptqmodel.* Try: pip install gptqmodel",
        ),
        (
            {"quant_method": "quark"},
            r"quantised \(quark\), .* Try: pip install amd-quark, or target.path= its unquantised",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install bitsandbytes"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "gptqmodel" in message and find_spec("gptqmodel"):
        pytest.skip("its package is installed")
    path = save(tmp_path, whole, "weight_scale", said)
    with pytest.raises(ConfigError, match=message) as error:
        states(path)
    assert "hf auth login" not in str(error.value)


def four_bits(weight: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return random blocks and scales of MXFP4 for experts [E, in, out], and what they mean."""
    experts, inputs, outputs = weight.shape
    shape = (experts, outputs, inputs // 32)
    blocks = torch.randint(256, (*shape, 16), generator=gen).byte()
    scales = torch.randint(120, 124, shape, generator=gen).byte()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    meant = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
    return blocks, scales, meant.flatten(-2).transpose(1, 2).contiguous()


def test_experts_of_four_bits_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = families.build("gpt_oss")
    gen = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = weight.clone()
            continue
        blocks, scales, meant = four_bits(weight, gen)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weight.copy_(meant)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "mxfp4").mkdir()
    save_file(stored, tmp_path / "mxfp4" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["self_attn", "mlp.router", "embed_tokens", "lm_head"],
    }
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(config))
    close(states(tmp_path / "mxfp4"), states(tmp_path / "plain"), terms=8 * SIZE)
