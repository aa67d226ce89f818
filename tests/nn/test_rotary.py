"""Rotary embeddings against transformers' own, and which of a target's a draft takes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specforge_core.nn.rotary import Rotary, draft_rope, rotate
from specforge_core.testing.close import close

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("scaling", [{}, YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_rotation_is_the_targets(scaling: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, **scaling}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters=rope,
    )
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, 16, generator=gen)
    positions = torch.randint(256, (9,), generator=gen)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    ours = rotate(x, Rotary(draft_rope(config.to_dict()), 16, 256)(positions))
    # angles of up to 256 radians are rounded to float32 before their sine is taken
    close(ours, want[0].transpose(0, 1), terms=1, factor=256)
    assert rotate(x.bfloat16(), Rotary(rope, 16, 256)(positions)).dtype == torch.bfloat16


def test_what_a_draft_takes_of_the_targets_parameters() -> None:
    plain = {"rope_type": "default", "rope_theta": 7.0}
    assert draft_rope({"rope_theta": 7.0}) == plain
    assert draft_rope({"rope_parameters": {**plain, "partial_rotary_factor": 0.5}}) == plain
    assert draft_rope({"rope_parameters": {**YARN, "rope_theta": 9.0}}, theta=7.0) == plain
    old = {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert draft_rope(old) == {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    sections = {"rope_type": "mrope", "mrope_section": [1, 2], "rope_theta": 7.0}
    assert draft_rope({"rope_parameters": sections}) == plain
    within = {"rope_type": "yarn", "rope_theta": 7.0, "original_max_position_embeddings": 9}
    assert draft_rope({"rope_scaling": {"type": "yarn"}, **within}) == within
    kinds = {"full_attention": plain, "sliding_attention": {"rope_theta": 1.0}}
    assert draft_rope({"rope_parameters": kinds}) == plain


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_what_is_not_one_table_of_a_whole_head_becomes_plain_rope_of_its_theta(kind: str) -> None:
    factors = {"factor": 2.0, "long_factor": [2.0], "original_max_position_embeddings": 64}
    plain = {"rope_type": "default", "rope_theta": 7.0}
    assert draft_rope({"rope_scaling": {"type": kind, **factors}, "rope_theta": 7}) == plain
    given = {"rope_type": kind, "rope_theta": 7.0, "partial_rotary_factor": 0.25}
    assert draft_rope({"rope_parameters": {"full_attention": given}}) == plain


@pytest.mark.parametrize(
    ("text", "module", "rotary"),
    [
        (
            "Qwen2_5_VLTextConfig",
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
            "Qwen2_5_VLRotaryEmbedding",
        ),
        (
            "Qwen3VLTextConfig",
            "transformers.models.qwen3_vl.modeling_qwen3_vl",
            "Qwen3VLTextRotaryEmbedding",
        ),
    ],
)
def test_multimodal_rope_on_text_is_the_plain_one_that_a_draft_takes(
    text: str, module: str, rotary: str
) -> None:
    """The three positions of a token of text are one, and no engine reads sections of a draft."""
    sections = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 500.0}
    config = getattr(transformers, text)(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters=sections,
    )
    rope = draft_rope(config.to_dict())
    assert rope == {"rope_type": "default", "rope_theta": 500.0}
    positions = torch.arange(0, 256, 25)
    theirs = getattr(import_module(module), rotary)(config)
    cos, sin = theirs(torch.zeros(1), positions.expand(3, 1, -1))
    for ours, wanted in zip(Rotary(rope, 16, 256)(positions), (cos, sin), strict=True):
        want = wanted.reshape(-1, len(positions), 16)  # one for each axis, or all in one
        for axis in want:
            close(ours, axis[:, :8], terms=1, factor=256)
