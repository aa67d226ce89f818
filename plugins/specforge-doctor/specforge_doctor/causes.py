"""What an export says differently from a fresh one, by the cause of trouble it would be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import Export

MISSING = "nothing"
ORDER = (
    *("layer ids", "label layout", "norms", "rope", "vocabulary map", "template", "mask token"),
    *("block size", "other settings", "weights"),
)
TEMPLATE = "template"
NAMED = ORDER[:8]  # each of them changes what an engine does
Rule = Callable[[tuple[str, ...]], bool]  # of a key's path, in small letters

_VOCABULARY = ("d2t", "t2d", "draft_id_to_target_id", "draft_vocab_size", "vocab_size")
_ROPE = ("rope", "rotary", "partial_rotary")
_CONFIG_RULES: tuple[tuple[str, Rule], ...] = (
    ("layer ids", lambda path: path[-1].endswith(("layer_ids", "num_aux_hidden_states"))),
    ("label layout", lambda path: path[-1] in ("label_layout", "sample_from_anchor")),
    ("norms", lambda path: "norm" in path[-1]),
    (
        "rope",
        lambda path: (
            any(part.startswith(_ROPE) for part in path) or path[-1] == "max_position_embeddings"
        ),
    ),
    ("vocabulary map", lambda path: path[-1] in _VOCABULARY),
    ("mask token", lambda path: "mask_token" in path[-1]),
    (
        "block size",
        lambda path: path[-1] in ("block_size", "num_draft_tokens", "speculative_tokens"),
    ),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One key or tensor of an export that is not what the checkpoint exports."""

    cause: str
    where: str  # "a.b" of config.json, or a tensor's name
    found: str
    expected: str
    path: tuple[str, ...] = ()  # of the key; of a tensor there is none

    def __str__(self) -> str:
        return f"{self.where} is {self.found}, expected {self.expected}"


def differences(found: Export, fresh: Export) -> list[Difference]:
    """Return all differences, in the order of the causes."""
    ours, theirs = dict(_flat(fresh.config)), dict(_flat(found.config))
    result = [
        Difference(_config_cause(path), ".".join(path), _show(given), _show(expected), path)
        for path in sorted(ours.keys() | theirs.keys())
        if (given := theirs.get(path)) != (expected := ours.get(path))
    ]
    for name in sorted(found.weights.keys() | fresh.weights.keys()):
        one, other = found.weights.get(name), fresh.weights.get(name)
        if one is None or other is None or not _same(one, other):
            shown = _describe(one, other)
            result.append(Difference(_tensor_cause(name), name, *shown))
    return sorted(result, key=lambda item: ORDER.index(item.cause))


def repair(found: Export, fresh: Export, causes: set[str]) -> Export:
    """Return the export with everything that belongs to `causes` as it is in the fresh one."""
    config: dict[str, Any] = copy.deepcopy(dict(found.config))
    weights = dict(found.weights)
    expected = dict(_flat(fresh.config))
    for item in differences(found, fresh):
        if item.cause not in causes:
            continue
        if item.path:
            _put(config, item.path, expected.get(item.path))
            continue
        weights.pop(item.where, None)
        if item.where in fresh.weights:
            weights[item.where] = fresh.weights[item.where]
    return Export(config, weights)


def _flat(
    value: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, (*above, key))
        elif inner is not None:  # null is what engines take for a key that is not there
            yield (*above, key), inner


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for parent in parents:
        inner = config.get(parent)
        config[parent] = inner = inner if isinstance(inner, dict) else {}
        config = inner
    if value is None:
        config.pop(last, None)
    else:
        config[last] = value


def _config_cause(path: tuple[str, ...]) -> str:
    small = tuple(part.lower() for part in path)
    return next((cause for cause, rule in _CONFIG_RULES if rule(small)), "other settings")


def _tensor_cause(name: str) -> str:
    parts = name.lower().split(".")
    if any("norm" in part for part in parts):
        return "norms"
    return "vocabulary map" if parts[-1] in _VOCABULARY else "weights"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _describe(found: Tensor | None, expected: Tensor | None) -> tuple[str, str]:
    if found is None or expected is None or found.shape != expected.shape:
        return _shape(found), _shape(expected)
    if found.dtype != expected.dtype:
        return _shape(found), _shape(expected)
    places = (found != expected).flatten().nonzero().squeeze(1)
    first = int(places[0])
    count = f" ({len(places)} of {found.numel()} values differ)"
    return (
        f"{_number(found.flatten()[first])} at {first}{count}",
        _number(expected.flatten()[first]),
    )


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}"


def _shape(value: Tensor | None) -> str:
    if value is None:
        return MISSING
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _show(value: Any) -> str:
    return MISSING if value is None else json.dumps(value)
