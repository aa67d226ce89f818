"""The published checkpoint layout, written for engines and read back.

Formats: `hf` (the published layout), `sglang` and `vllm` (the same files, refused where
the engine would serve something else than was trained).  Layer ids count outputs from 0;
vLLM adds its own 1 to `dflash_config.target_layer_ids`, so all three write the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from specforge_core.drafts.tensors import (
    check_alike,
    check_given,
    check_options,
    written,
)
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.nn.decoder import decoder_config
from specforge_core.nn.rotary import stored_rope
from specforge_core.types import Draft, Export, TargetInfo

from .config import DFlashConfig, DraftShape, LayerType, objective
from .model import DFlashModel, Frozen, parts

ARCHITECTURE = "DFlashDraftModel"
FORMATS = ("hf", "sglang", "vllm")
# engine -> kinds of targets whose embeddings it scales for a draft, too: in SGLang the tables of
# these do so themselves, in vLLM the draft does
SCALED = {"sglang": ("gemma3", "gemma4"), "vllm": ("gemma4",)}
# key of config.json -> what goes wrong where it differs, for the method's own keys
CAUSES = {
    "target_layer_ids": "layer ids",
    **dict.fromkeys(("is_causal", "causal"), "causal block"),
    **dict.fromkeys(("label_layout", "sample_from_anchor"), "label layout"),
    "mask_token_id": "mask token",
    **dict.fromkeys(("block_size", "num_draft_tokens"), "block size"),
}
# options of other trainers' drafts that no tensor shows -> their values in a draft without them
UNKNOWN = {
    "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1),
    **dict.fromkeys(("rope_is_neox_style", "is_neox_style"), (None, True)),
    "use_swa": (None, False),
}


def export_draft(
    config: DFlashConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return the files' contents; None for a format this package does not know."""
    if format not in FORMATS:
        return None
    model, frozen = parts(draft, DFlashModel)
    if format != "hf" and (reason := _not_served(config, frozen, target, format)):
        raise ConfigError(reason)
    return Export(
        config=export_config(config, model.shape, target),
        weights=written(model.state_dict(), config.export_dtype),
        serve={
            engine: options
            for engine, options in serving_options(config).items()
            if _not_served(config, frozen, target, engine) is None
        },
        causes=CAUSES,
    )


def serving_options(config: DFlashConfig) -> dict[str, dict[str, Any]]:
    """Return what each engine is started with."""
    # SGLang takes the length of a block from config.json; vLLM counts the drafted tokens
    return {
        "sglang": {"speculative_algorithm": "DFLASH"},
        "vllm": {"method": "dflash", "num_speculative_tokens": config.num_draft_tokens},
    }


def _not_served(
    config: DFlashConfig, frozen: Frozen, target: TargetInfo, engine: str
) -> str | None:
    """Return why an engine would draft something else than was trained."""
    if config.label_layout != "same_position":
        return (
            f"{engine} serves DFlash blocks whose slot k holds token a+k, and this draft was "
            f"trained with label_layout {config.label_layout!r}: nothing would be accepted. "
            "Try: --format hf, or train with strategy.label_layout=same_position"
        )
    if (fewest := objective(config).variable_prefix) > 1:
        return (
            f"{engine} drafts from the last verified token alone, and this draft was trained "
            f"behind {fewest} known tokens or more (variable_prefix): little would "
            "be accepted. Try: --format hf, or train with strategy.variable_prefix=1"
        )
    return target_not_served(frozen, target, engine)


def target_not_served(frozen: Frozen, target: TargetInfo, engine: str) -> str | None:
    """Return what of a target's embedding and head an engine leaves out of the drafts around them.

    The draft was trained with it.  None where the engine drafts from the same.
    """
    if frozen.has_bias:
        return (
            f"{engine} drafts with the target's head without its bias, and target "
            f"{target.name_or_path!r} has one: this draft was trained with it. Try: --format hf"
        )
    kind = str(target.config.get("model_type"))
    if frozen.scale != 1.0 and not kind.startswith(SCALED.get(engine, ())):
        return (
            f"target {target.name_or_path!r} multiplies its embeddings by {frozen.scale:g}, and "
            f"{engine} drafts from those of {kind} without that factor: little would be accepted. "
            "Try: --format hf"
        )
    return None


def export_config(config: DFlashConfig, shape: DraftShape, target: TargetInfo) -> dict[str, Any]:
    """Return config.json."""
    sliding = shape.sliding_window is not None
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "block_size": shape.block_size,
        "dflash_config": {
            "block_size": shape.block_size,
            "mask_token_id": shape.mask_token_id,
            "target_layer_ids": list(shape.capture_layers),
            # not part of the published layout: says what a wrong guess would silently break
            "label_layout": config.label_layout,
            "sample_from_anchor": config.first_slot == 0,
            "num_draft_tokens": config.num_draft_tokens,
        },
        "num_target_layers": target.num_layers,
        "num_hidden_layers": shape.num_layers,
        "layer_types": list(shape.layer_types),
        # sliding layers: causal in the block, sliding_window - 1 positions to the left
        "sliding_window": shape.sliding_window,
        "use_sliding_window": sliding,
        "max_window_layers": shape.layer_types.index("sliding_attention")
        if sliding
        else shape.num_layers,
        **decoder_config(shape),
        "dtype": config.export_dtype,
    }
    if shape.causal:  # SGLang reads the first, vLLM either: all layers are causal
        out |= {"is_causal": True, "dflash_config": {**out["dflash_config"], "causal": True}}
    special = {n: target.config.get(n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    out |= {name: value for name, value in special.items() if value is not None}
    if shape.softcap is not None:
        out["final_logit_softcapping"] = shape.softcap
    return out


def load_export(config: DFlashConfig, model: nn.Module, export: Export) -> bool:
    """Load an export into `model`.  Raises CheckpointError when it was made for another draft."""
    assert isinstance(model, DFlashModel)
    if ARCHITECTURE not in (export.config.get("architectures") or ()):
        return False
    _check(config, model.shape, export.config)
    check_given(export.weights, model.state_dict())
    model.load_state_dict(dict(export.weights))
    return True


def _check(config: DFlashConfig, shape: DraftShape, given: Mapping[str, Any]) -> None:
    """Compare everything that would load without an error and then be accepted nowhere."""
    nested: Mapping[str, Any] = given.get("dflash_config") or {}
    for name, plain in UNKNOWN.items():
        for value in (nested.get(name), given.get(name)):
            if value not in plain:
                raise CheckpointError(
                    f"the export was trained with {name} {value}, which this package does not "
                    "know. Use another checkpoint"
                )
    rope = stored_rope(given)
    layers = nested.get("target_layer_ids", given.get("target_layer_ids"))
    depth = int(given.get("num_hidden_layers", shape.num_layers))
    types = given.get("layer_types") or _types(given, depth)
    # what is said here is of all layers; where nothing is, those that slide are causal
    causal = given.get("is_causal", nested.get("causal"))
    slide = [kind == "sliding_attention" for kind in types]
    pairs = {
        "causal": (bool(causal) and not all(slide), shape.causal and not all(slide)),
        "block_size": (nested.get("block_size", given.get("block_size", 16)), shape.block_size),
        "layers": (layers, list(shape.capture_layers)),
        "label_layout": (_layout(given, nested, config.label_layout), config.label_layout),
        "mask_token_id": (nested.get("mask_token_id"), shape.mask_token_id),
        "num_layers": (depth, shape.num_layers),
        "layer_types": (list(types), list(shape.layer_types)),
        "sliding_window": (
            given.get("sliding_window") if "sliding_attention" in types else None,
            shape.sliding_window,
        ),
        "num_heads": (given.get("num_attention_heads"), shape.num_heads),
        "head_dim": (given.get("head_dim"), shape.head_dim),
        "rope_theta": (rope["rope_theta"], shape.rope["rope_theta"]),
    }
    of_target = {
        "hidden_size": (given.get("hidden_size", shape.hidden_size), shape.hidden_size),
        "rms_norm_eps": (given.get("rms_norm_eps", shape.rms_norm_eps), shape.rms_norm_eps),
        "vocab_size": (given.get("vocab_size", shape.vocab_size), shape.vocab_size),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "softcap": (given.get("final_logit_softcapping", shape.softcap), shape.softcap),
        "rope parameters": (rope, dict(shape.rope)),
    }
    if causal is False and any(slide):
        raise CheckpointError(
            "the export says that its sliding layers see their whole block (is_causal false), "
            "which no layers do here. Try a draft without sliding layers"
        )
    check_options(pairs, of_target)
    check_alike(given, nested, "dflash_config")


def _types(given: Mapping[str, Any], depth: int) -> list[LayerType]:
    """Return the layers' types as engines take them from a config.json that does not list them."""
    slides = given.get("use_sliding_window") and given.get("sliding_window") is not None
    first = int(given.get("max_window_layers", 28)) if slides else depth
    return ["full_attention" if i < first else "sliding_attention" for i in range(depth)]


def _layout(given: Mapping[str, Any], nested: Mapping[str, Any], ours: str) -> str:
    """Return the layout of the labels: of two places that differ, the one that is not ours.

    Published checkpoints have neither, and all predict the slots' own positions.
    """
    anchored = nested.get("sample_from_anchor", given.get("sample_from_anchor"))
    said = [] if anchored is None else ["next_token" if anchored else "same_position"]
    said.append(nested.get("label_layout", said[0] if said else "same_position"))
    return next((layout for layout in said if layout != ours), ours)
