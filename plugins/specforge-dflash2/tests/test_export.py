"""The published layout key by key, and what would load and then fail silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from specforge_dflash import build_draft, specforge_export as export_plain
from specforge_dflash2 import (
    DFlash2Config,
    specforge_adapter,
    specforge_export,
    specforge_import,
)
from torch import Tensor

from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Export


def export(tiny: Any, format: str = "hf") -> Export:
    made: Export | None = specforge_export(
        config=tiny.config, draft=tiny.draft, target=tiny.target, format=format
    )
    assert made is not None
    return made


@pytest.mark.parametrize("format", ["hf", "sglang", "vllm"])
def test_the_layout_is_dflashs_with_convolutions_and_selector(kit: Any, format: str) -> None:
    tiny = kit.tiny(softcap=30.0, selector_top_k=8)
    plain = build_draft(
        tiny.config, tiny.target, tiny.frozen.embed_tokens, tiny.frozen.lm_head, mask_token_id=40
    )
    want: Any = export_plain(config=tiny.config, draft=plain, target=tiny.target, format=format)
    made = export(tiny, format)
    nested = {
        **want.config["dflash_config"],
        "conv_kernel_size": 2,
        "conv_group_size": 6,
        "selector_rank": 5,
        "selector_top_k": 8,
        "output_multiplier": 1.0,
        "final_logit_softcapping": 30.0,  # where engines look for it in this layout
    }
    named = {"architectures": ["DFlash2DraftModel"], "dflash_config": nested}
    assert made.config == {**want.config, **named}
    assert made.serve == want.serve
    assert made.environment == {"vllm": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
    more = {
        "candidate_selector.predecessor_codebook": (41, 5),
        "candidate_selector.successor_codebook": (41, 5),
        "candidate_selector.hidden_projection.weight": (5, 24),
    }
    for layer in range(2):
        for name in ("attention_conv", "mlp_conv"):
            more[f"layers.{layer}.{name}.base_kernel"] = (2, 2, 24)
            more[f"layers.{layer}.{name}.kernel_projection.weight"] = (2 * 2 * 4, 24)
    shapes = {name: tuple(value.shape) for name, value in made.weights.items()}
    assert shapes == {n: tuple(w.shape) for n, w in want.weights.items()} | more
    assert {value.dtype for value in made.weights.values()} == {torch.bfloat16}


def test_an_unknown_format_is_left_to_others(kit: Any) -> None:
    tiny = kit.tiny()
    args = {"config": tiny.config, "draft": tiny.draft, "target": tiny.target}
    assert specforge_export(**args, format="gguf") is None


def test_engines_are_refused_a_head_with_a_bias(kit: Any) -> None:
    tiny = kit.tiny(selector_top_k=4)
    wide = torch.cat([tiny.frozen.lm_head, torch.ones(41, 8)], dim=1)
    tiny.frozen.lm_head = torch.nn.Parameter(wide, requires_grad=False)
    with pytest.raises(ConfigError, match="without its bias"):
        export(tiny, "sglang")
    assert export(tiny).weights


def test_reloading_gives_every_weight_back(kit: Any) -> None:
    tiny, other = kit.tiny(export_dtype="float32"), kit.tiny(export_dtype="float32", seed=9)
    made = export(tiny)
    assert not torch.equal(export(other).weights["fc.weight"], made.weights["fc.weight"])
    assert specforge_import(other.config, other.draft, made)
    again = export(other)
    assert again.config == made.config
    assert all(torch.equal(again.weights[name], value) for name, value in made.weights.items())


def test_a_published_draft_without_our_own_fields_is_read(kit: Any) -> None:
    tiny = kit.tiny(softcap=30.0)
    made = export(tiny)
    config = {k: v for k, v in made.config.items() if k != "final_logit_softcapping"}
    ours = ("label_layout", "sample_from_anchor", "num_draft_tokens", "output_multiplier")
    config["dflash_config"] = {k: v for k, v in config["dflash_config"].items() if k not in ours}
    assert specforge_import(tiny.config, tiny.draft, replace(made, config=config))


def test_another_methods_export_is_left_to_it(kit: Any) -> None:
    tiny = kit.tiny()
    made = export(tiny)
    config = {**made.config, "architectures": ["DFlashDraftModel"]}
    assert not specforge_import(tiny.config, tiny.draft, replace(made, config=config))


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda c, _: c["dflash_config"].update(conv_group_size=12), "conv_group_size=12"),
    (lambda c, _: c["dflash_config"].update(conv_kernel_size=3), "conv_kernel_size=3"),
    (lambda c, _: c["dflash_config"].pop("selector_rank"), "say selector_rank, which is 5"),
    (lambda c, _: c["dflash_config"].update(selector_top_k=16), "strategy.selector_top_k=16"),
    (lambda c, _: c["dflash_config"].update(output_multiplier=0.5), "output_multiplier=0.5"),
    (lambda c, _: c["dflash_config"].update(final_logit_softcapping=9.0), "softcapping 9.0"),
    (lambda c, _: c["dflash_config"].update(mask_token_id=7), "mask_token_id=7"),
    (lambda c, _: c["dflash_config"].update(block_size=8), "block_size=8"),
    (lambda _, w: w.pop("candidate_selector.successor_codebook"), "successor_codebook"),
    (lambda _, w: w.pop("layers.1.mlp_conv.base_kernel"), "layers.1.mlp_conv.base_kernel"),
    (lambda _, w: w.update({"layers.0.more": torch.ones(1)}), "layers.0.more"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[m for _, m in CHANGES])
def test_another_draft_is_refused_and_nothing_is_loaded(
    kit: Any, change: Change, message: str
) -> None:
    made, tiny = export(kit.tiny()), kit.tiny(seed=9)
    config = {**made.config, "dflash_config": dict(made.config["dflash_config"])}
    weights = dict(made.weights)
    change(config, weights)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        specforge_import(tiny.config, tiny.draft, replace(made, config=config, weights=weights))
    assert all(torch.equal(before[name], v) for name, v in tiny.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_group_size": 16}, "conv_group_size 16 does not divide .* 24.*conv_group_size=8"),
        ({"selector_top_k": 99, "conv_group_size": 8}, "selector_top_k=41"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_capture(
    kit: Any, options: dict[str, Any], message: str
) -> None:
    config = DFlash2Config.model_validate({"name": "dflash2", "mask_token_id": 1, **options})
    with pytest.raises(ConfigError, match=message):
        specforge_adapter(config=config, target=kit.target())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_layout": "next_token"}, "same_position"), ({"conv_kernel_size": 9}, "=8")],
)
def test_options_that_do_not_fit_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFlash2Config.model_validate({"name": "dflash2", **options})


def test_sglang_walks_over_powers_of_two(kit: Any) -> None:
    tiny = kit.tiny(selector_top_k=6)
    with pytest.raises(ConfigError, match=r"strategy\.selector_top_k=4"):
        export(tiny, "sglang")
    assert set(export(tiny).serve) == {"vllm"}
