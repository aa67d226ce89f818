"""The target's modules: where its parts are, as the model itself says, with or without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto

from ..errors import CaptureError
from ..types import TargetInfo


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a language model keeps what is captured.  The decoder's output is what its head reads.

    An image model's are those of its text model.
    """

    decoder: nn.Module  # from token ids to the normed final state
    layers: nn.ModuleList
    embedding: nn.Module
    head: nn.Module | None


def find_parts(model: Any) -> Parts:
    """Find the module around the input embedding, and the longest list of layers in it.

    Raises CaptureError where there is none.
    """
    embedding = model.get_input_embeddings()
    around = (m for m in model.modules() if any(child is embedding for child in m.children()))
    decoder = next(around, None)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)] if decoder else []
    if decoder is None or not lists:
        raise CaptureError(
            f"{type(model).__name__} has no list of layers beside its input embedding, so there is "
            "nothing to capture. Choose another target.path, or another target.engine"
        )
    return Parts(decoder, max(lists, key=len), embedding, model.get_output_embeddings())


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads such a target: a text model wherever it can."""
    own = getattr(config, "auto_map", None) or {}
    causal, image = AutoModelForCausalLM, AutoModelForImageTextToText
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return causal
    known = config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return image if causal.__name__ not in own and (known or image.__name__ in own) else causal


def text_model(model: Any) -> Any:
    """Return the whole language model inside a model of texts and images, head and all.

    Most have none: their text models are decoders, and the head is the outer one's.
    """
    inner: Any = getattr(model, "language_model", None)
    whole = isinstance(inner, PreTrainedModel)
    if not whole or inner.get_output_embeddings() is None:
        return model
    inner.generation_config = model.generation_config
    return inner


def skeleton(target: TargetInfo) -> Any | None:
    """Return the target's modules without memory for weights; None where transformers has none."""
    try:
        config = AutoConfig.from_pretrained(
            target.name_or_path,
            revision=target.revision,
            trust_remote_code=target.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return build(config, target.trust_remote_code)


def build(config: Any, trust_remote_code: bool) -> Any | None:
    """Return the modules that a config describes; None where transformers cannot make them."""
    return _build(_Key(config, trust_remote_code))


class _Key:
    """Equal for configs that say the same."""

    def __init__(self, config: Any, trust_remote_code: bool) -> None:
        self.config, self.trust_remote_code = config, trust_remote_code
        place = getattr(config, "_name_or_path", "")
        self._text = f"{place} {trust_remote_code} {config.to_json_string(use_diff=False)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=4)
def _build(key: _Key) -> Any | None:
    auto = auto_class(key.config)
    try:
        with torch.device("meta"):
            return auto.from_config(key.config, trust_remote_code=key.trust_remote_code)
    except Exception:  # the code of any model, some of it remote; loading it says what is wrong
        return None


def count_layers(model: Any | None, said: int) -> int:
    """Return the layers that a skeleton runs; what its config said where there is none."""
    if model is None:
        return said
    try:
        return len(find_parts(model).layers)
    except CaptureError:
        return said


def parameter_names(target: TargetInfo) -> dict[str, str]:
    """Return the names of `embed_tokens`, `lm_head`, `final_norm` and `lm_head.bias`, if they are.

    Of a target that transformers does not know, the usual ones.
    """
    model = skeleton(target)
    if model is None:
        return {
            "embed_tokens": "model.embed_tokens.weight",
            "lm_head": "lm_head.weight",
            "lm_head.bias": "lm_head.bias",
            "final_norm": "model.norm.weight",
        }
    parts = find_parts(model)
    found = {"embed_tokens": f"{_name(model, parts.embedding)}.weight"}
    if parts.head is not None:
        found["lm_head"] = f"{_name(model, parts.head)}.weight"
        if getattr(parts.head, "bias", None) is not None:
            found["lm_head.bias"] = f"{_name(model, parts.head)}.bias"
    if (norm := _last_norm(parts, target.hidden_size)) is not None:
        found["final_norm"] = f"{_name(model, norm)}.weight"
    return found


def is_tied(target: TargetInfo) -> bool:
    """Say whether the target's head is its embedding, unless its files have one of its own."""
    model = skeleton(target)
    if model is None:
        return bool(target.config.get("tie_word_embeddings"))
    parts = find_parts(model)
    return parts.head is not None and parts.head.weight is parts.embedding.weight


def _last_norm(parts: Parts, hidden_size: int) -> nn.Module | None:
    children = reversed(list(parts.decoder.children()))
    return next((m for m in children if _shape(m) == (hidden_size,)), None)


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


def _name(model: nn.Module, part: nn.Module) -> str:
    found: str = next(name for name, module in model.named_modules() if module is part)
    return found


def best_match(name: str, keys: Iterable[str]) -> list[str]:
    """Return the checkpoint's keys that may hold a parameter of the model, the likeliest first.

    Checkpoints spell the way to a module differently, and its own name alike.
    """
    wanted = name.split(".")

    def likeness(key: str) -> tuple[int, int, int]:
        parts = key.split(".")
        same = 0
        while same < min(len(parts), len(wanted)) and parts[-1 - same] == wanted[-1 - same]:
            same += 1
        inside = any(part.isdigit() for part in parts)  # of a layer
        return same, -int(inside), len(set(parts) & set(wanted))

    found = [key for key in keys if key.split(".")[-2:] == wanted[-2:]]
    return sorted(found, key=lambda key: (likeness(key), -len(key)), reverse=True)


def stored_as(name: str, keys: Iterable[str], target: TargetInfo) -> list[str]:
    """Return the checkpoint's keys that transformers loads under a parameter's name.

    It renames those of families whose published checkpoints have a name of their own: GPT-NeoX.
    """
    model = skeleton(target)
    ways = [] if model is None else get_model_conversion_mapping(model)
    found = []
    for key in keys:
        now = key
        for way in ways:
            if isinstance(way, WeightRenaming):
                now = way.rename_source_key(now)[0]
        if now == name:
            found.append(key)
    return found
