"""Checkpoints of four bits a weight in the layouts that AWQ's and GPTQ's tools publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # inputs that share a scale and a zero
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs is in which four bits
Pack = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def _eight(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack 4-bit values [..., 8 * n] into int32 [..., n], the first in the lowest bits."""
    parts = values.long().unflatten(-1, (-1, 8))[..., list(order)]
    whole = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def _gptq(quantised: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": _eight(quantised.T).T.contiguous(),
        "qzeros": _eight(zeros - 1),  # one less, as its first format has it
        "scales": scales,
        "g_idx": torch.arange(quantised.shape[0], dtype=torch.int32) // GROUP,
    }


def _awq(quantised: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    packed = {"qweight": _eight(quantised, AWQ_ORDER), "qzeros": _eight(zeros, AWQ_ORDER)}
    return {**packed, "scales": scales}


def _quantise(target: Path, pack: Pack, said: dict[str, Any]) -> dict[str, Tensor]:
    """Quantise a saved target's layers; return all weights as they then are to be read."""
    stored, meant = {}, {}
    for name, weight in load_file(target / "model.safetensors").items():
        if "layers" not in name or weight.ndim != 2:
            stored[name] = meant[name] = weight
            continue
        groups = weight.T.float().unflatten(0, (-1, GROUP))  # [groups, GROUP, out]
        low, high = groups.amin(1), groups.amax(1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(1, 15)
        quantised = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
        meant[name] = ((quantised - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1).T
        for kind, tensor in pack(quantised.flatten(0, 1), zeros, scales).items():
            stored[f"{name.removesuffix('weight')}{kind}"] = tensor
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    said = {"bits": 4, "group_size": GROUP, **said}
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return meant


def gptq(target: Path) -> dict[str, Tensor]:
    """Quantise a saved target as GPTQ's tools do."""
    said = {"quant_method": "gptq", "desc_act": False, "sym": False, "damp_percent": 0.1}
    return _quantise(target, _gptq, said)


def awq(target: Path) -> dict[str, Tensor]:
    """Quantise a saved target as AWQ's tools do."""
    return _quantise(target, _awq, {"quant_method": "awq", "version": "gemm", "zero_point": True})
