"""How a target goes on from its cache: found by running it, not by its name.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import ConfigError
from ..target.proof import relative_error
from ..target.skeleton import find_parts

CACHES = ("cache", "past_key_values", "cache_params")  # as versions and families call it
PROBE = 8  # tokens, before and behind the place where a probe goes on from its cache


@dataclass(frozen=True, slots=True)
class Abilities:
    """How a target goes on from its cache."""

    own: bool  # it takes no cache but one that it makes itself
    recurrent: bool  # some of its past is a state that cannot be cropped
    positions: bool  # it must be told where tokens are: it counts them by another layer
    many: bool  # several tokens at once give what they give in one pass over all
    outside: bool = field(default=False, kw_only=True)  # it keeps a state in its own modules
    cuts: bool = field(default=False, kw_only=True)  # it drops states whose logits nobody asks for
    trees: bool  # all of its past is keys and values, seen through a mask that one may give


def new_cache(model: Any) -> DynamicCache:
    """Return an empty cache with the kinds of layers that a model needs, none of them sliding."""
    try:
        cache = DynamicCache(config=model.config)
    except (AttributeError, KeyError, ValueError, TypeError):  # of a config that says no kinds
        return DynamicCache()
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            states = getattr(layer, "number_of_states", None)
            cache.layers[place] = (
                DynamicLayer()  # type: ignore[no-untyped-call]
                if states is None
                else LinearAttentionAndFullAttentionLayer(number_of_states=states)
            )
    return cache


def forward(
    model: Any, ids: Tensor, cache: Any, keep: int, extra: dict[str, Tensor]
) -> tuple[Tensor, Any]:
    """Return the logits [keep, V] of the last tokens of ids [1, T], and the cache they went into.

    Without a cache the model makes its own.
    """
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in accepted), "past_key_values")
    kept = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
    given = {} if cache is None else {name: cache}
    output = model(input_ids=ids, use_cache=True, **given, **kept, **extra)
    logits: Tensor = output.logits[0, -keep:]
    return logits, getattr(output, name) if cache is None else cache


def positions_from(start: int, ids: Tensor) -> dict[str, Tensor]:
    """Return the position ids of tokens [1, T] behind `start` others."""
    places = torch.arange(start, start + ids.shape[1], device=ids.device)
    return {"position_ids": places[None]}


def probe_tokens(model: Any) -> Tensor:
    """Return ids [1, 2 * PROBE] to try a model with."""
    size = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    return torch.randint(size, (1, 2 * PROBE), generator=draw).to(model.device)


@torch.inference_mode()
def probe(model: Any) -> Abilities:
    """Return how a model goes on from its cache.

    Raises ConfigError where it does not go on as a pass over all tokens would.
    """
    text = model.config.get_text_config(decoder=True)
    ids = probe_tokens(model)
    cache = new_cache(model)
    try:
        whole, _ = forward(model, ids, cache, PROBE, {})
        own = False
    except ValueError:  # of another class than it knows
        whole, cache = forward(model, ids, None, PROBE, {})
        own = True
    windows = getattr(text, "sliding_window", None) or _kinds(text) - {"full_attention"}
    plain = all(type(layer) is DynamicLayer for layer in cache.layers) and not own
    recurrent = own or any(isinstance(c, LinearAttentionCacheLayerMixin) for c in cache.layers)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    nearest = float("inf")
    for size in (PROBE, 1):
        for positions in (False, True) if takes else (False,):
            found = _go_on(model, ids, None if own else new_cache(model), size, positions)
            nearest = min(nearest, relative_error(found, whole))
            if equal(found, whole):
                trees = plain and not windows and size > 1
                return Abilities(
                    own, recurrent, positions, many=size > 1, trees=trees, cuts=_cuts(model)
                )
    raise ConfigError(
        f"target {model.config.name_or_path!r} does not go on from its cache as it reads a whole "
        f"text: logits differ by {nearest:.1%}. Evaluate it in a serving engine"
    )


def _cuts(model: Any) -> bool:
    """Say whether the decoder itself is told which logits are wanted (Gemma 4)."""
    return "logits_to_keep" in inspect.signature(find_parts(model).decoder.forward).parameters


def _go_on(model: Any, ids: Tensor, cache: Any, size: int, positions: bool) -> Tensor:
    """Return the logits [PROBE, V] of the last tokens, `size` of them at a time."""
    found, place = [], 0
    for part in (ids[:, :PROBE], *torch.split(ids[:, PROBE:], size, dim=1)):
        extra = positions_from(place, part) if positions else {}
        logits, cache = forward(model, part, cache, part.shape[1], extra)
        found.append(logits)
        place += part.shape[1]
    return torch.cat(found[1:])


def _kinds(text: Any) -> set[str]:
    return set(getattr(text, "layer_types", None) or ())


def equal(found: Tensor, whole: Tensor) -> bool:
    """Say whether logits are equal up to what other shapes of a pass round."""
    return relative_error(found, whole) <= max(1e-3, 16 * torch.finfo(whole.dtype).eps)
