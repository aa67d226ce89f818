"""Tiny random models of every family of language models that people train drafts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from specforge_core.testing.toy import toy_tokenizer

from .family_configs import (
    ENDS,
    FAMILIES,
    GEMMA3N,
    GEMMA4,
    HEAD,
    LINEAR,
    LLAMA4,
    OWN,
    PLAIN,
    SCALAR,
    rope,
)

# multimodal models: their text model, and the parts around it at their smallest
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = SMALL | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
QWEN = SMALL | {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
IMAGE = {"image_token_id": 259, "video_token_id": 257}
IMAGES = IMAGE | {"vision_start_token_id": 256, "eos_token_id": 258}
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3_mm": (
        "Gemma3",
        SCALAR,
        {"vision_config": VISION, "mm_tokens_per_image": 4}
        | {"image_token_index": 259, "boi_token_index": 257, "eoi_token_index": 257},
    ),
    "gemma3n": ("Gemma3n", GEMMA3N, {}),
    "gemma4": ("Gemma4", GEMMA4, {}),
    "glm4v": (
        "Glm4v",
        HEAD | rope("default", mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
        {"vision_config": QWEN | {"image_size": 28, "patch_size": 14}} | IMAGE,
    ),
    "llama4_mm": (
        "Llama4",
        LLAMA4,
        {
            "image_token_index": 259,
            "vision_config": VISION
            | {"vision_output_dim": 16, "projector_input_dim": 16}
            | {"projector_output_dim": 16},
        },
    ),
    "llava": (
        "Llava",
        {"model_type": "llama"},
        {"image_token_index": 259}
        | {"vision_config": VISION | {"model_type": "clip_vision_model"}},
    ),
    "mistral3_mm": (
        "Mistral3",
        HEAD | {"model_type": "mistral"},
        {"image_token_index": 259} | {"vision_config": VISION | {"model_type": "pixtral"}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        rope("default", mrope_section=[1, 1, 2]),
        {"vision_config": QWEN} | IMAGES,
    ),
    "qwen3_5": ("Qwen3_5", LINEAR, {"vision_config": QWEN, "eos_token_id": 258} | IMAGE),
    "qwen3_vl": (
        "Qwen3VL",
        HEAD | rope("default", mrope_section=[2, 3, 3], mrope_interleaved=True),
        {"vision_config": QWEN | {"deepstack_visual_indexes": [0]}} | IMAGES,
    ),
}
NAMES = sorted([*FAMILIES, *WRAPPED])


def build(name: str, seed: int = 0) -> Any:
    """Return a random model of a family; AttributeError where transformers has none."""
    torch.manual_seed(seed)
    if name in WRAPPED:
        stem, text, around = WRAPPED[name]
        config = getattr(transformers, f"{stem}Config")(text_config={**PLAIN, **text}, **around)
        model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    else:
        stem, extra = FAMILIES[name]
        base = {**ENDS, "initializer_range": 0.2, **OWN[stem]} if stem in OWN else PLAIN
        config = getattr(transformers, f"{stem.replace('+', '')}Config")(**{**base, **extra})
        head = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{stem.partition('+')[0]}{head}")(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zeros and ones, so that a forgotten norm or bias shows
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in key or "ln_" in key or "bias" in key):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def save(name: str, path: Path) -> None:
    """Save a random model of a family with the toy tokenizer."""
    build(name).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
