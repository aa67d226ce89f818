"""A draft's layers take the target's shape, unless options say otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from specforge_core.errors import ConfigError
from specforge_core.nn.decoder import (
    DecoderOptions,
    DecoderShape,
    decoder_config,
    decoder_fields,
    init_weights,
)
from specforge_core.types import TargetInfo

TARGET: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 5e5,
    "final_logit_softcapping": 30.0,
    "initializer_range": 0.01,
}


def shape(target: dict[str, Any], **options: Any) -> DecoderShape:
    info = TargetInfo(
        name_or_path="a/target",
        revision=None,
        hidden_size=128,
        num_layers=6,
        vocab_size=1000,
        config=target,
    )
    return DecoderShape(**decoder_fields(DecoderOptions(name="x", **options), info))


def test_the_shape_is_the_targets() -> None:
    found = shape(TARGET)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 2, 16)
    assert (found.intermediate_size, found.rms_norm_eps, found.max_positions) == (300, 1e-5, 4096)
    assert found.rope == {"rope_type": "default", "rope_theta": 5e5}
    assert (found.vocab_size, found.softcap, found.init_std) == (1000, 30.0, 0.01)


def test_options_win() -> None:
    options = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "intermediate_size": 7}
    found = shape(TARGET, **options, rope_theta=1e4)
    assert {name: getattr(found, name) for name in options} == options
    assert found.rope["rope_theta"] == 1e4


def test_the_config_reads_back_as_the_same_shape() -> None:
    first = shape({**TARGET, "final_logit_softcapping": None})
    written = decoder_config(first)
    assert shape(written) == first
    assert written["tie_word_embeddings"] is False
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"8 attention heads cannot share 3 key/value heads"):
        shape(TARGET, num_kv_heads=3)


def test_a_scale_of_the_targets_logits_is_no_matter_of_the_draft() -> None:
    assert shape({**TARGET, "logit_scale": 0.5}) == shape(TARGET)


def test_sizes_that_a_target_does_not_say_or_says_per_layer() -> None:
    bare = {key: TARGET[key] for key in ("max_position_embeddings",) if key in TARGET}
    found = shape(bare)
    assert found.num_heads * found.head_dim == found.hidden_size
    assert (found.num_kv_heads, found.intermediate_size) == (found.num_heads, 4 * found.hidden_size)
    assert shape({**TARGET, "intermediate_size": [48, 96, 64]}).intermediate_size == 96


def test_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 1)  # what was drawn before does not matter
        model = nn.Sequential(nn.Linear(64, 512), nn.RMSNorm(512))
        init_weights(model, 0.02, seed)
        return [parameter.detach() for parameter in model.parameters()]

    linear, bias, norm = weights(0)
    assert torch.equal(linear, weights(0)[0])
    assert not torch.equal(linear, weights(1)[0])
    # of 32,768 draws: one standard error is 0.4 %
    assert float(linear.std()) == pytest.approx(0.02, rel=0.02)
    assert bool((norm == 1).all())
    assert not bool(bias.any())


def test_a_layer_is_drawn_by_its_name() -> None:
    """So that many are drawn at the same time, in any order, and no two alike."""
    few = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    more = nn.ModuleDict({"other": nn.Linear(4, 4), "two": nn.Linear(8, 8), "one": nn.Linear(8, 8)})
    for model in (few, more):
        init_weights(model, 0.02, seed=3)
    assert torch.equal(few["one"].weight, more["one"].weight)
    assert torch.equal(few["two"].weight, more["two"].weight)
    assert not torch.equal(few["one"].weight, few["two"].weight)


def test_a_layer_that_the_caller_fills_is_left_as_it_is_and_the_others_are_drawn_alike() -> None:
    def drawn(skip: bool) -> nn.ModuleDict:
        model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 32)})
        nn.init.ones_(model["two"].weight)
        init_weights(model, 0.02, seed=3, but=model["two"] if skip else None)
        return model

    every, some = drawn(False), drawn(True)
    assert bool((some["two"].weight == 1).all())
    assert not bool((every["two"].weight == 1).any())
    assert torch.equal(every["one"].weight, some["one"].weight)
