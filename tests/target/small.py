"""Small targets of several families, to run whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from specforge_core.config import TargetConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "Gemma3Text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "SmolLM3": {},
    "Granite": {"embedding_multiplier": 6.0},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GPT2": {"n_inner": 64},
}
CPU = torch.device("cpu")


def save(path: Path, family: str) -> TargetConfig:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family]})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return TargetConfig(path=str(path), device="cpu", batch_tokens=64)
