"""What an export says differently from a fresh one, by the cause of trouble it would be.

A method names the causes of its own keys (`Export.causes`); the rest are those of
any transformer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specforge_core.types import Export

MISSING = "nothing"
NORMS, ROPE, VOCABULARY, TEMPLATE = "norms", "rope", "vocabulary", "template"
OTHER, WEIGHTS = "other settings", "weights"
UNNAMED = (TEMPLATE, OTHER, WEIGHTS)  # these say not what an engine would do otherwise
_ROPE = ("rope", "rotary", "partial_rotary")


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


def order(fresh: Export) -> tuple[str, ...]:
    """Return all causes, the method's own first: keys with one text are one cause."""
    general = (NORMS, ROPE, VOCABULARY, TEMPLATE, OTHER, WEIGHTS)
    return tuple(dict.fromkeys((*fresh.causes.values(), *general)))


def differences(found: Export, fresh: Export) -> list[Difference]:
    """Return all differences, in the order of the causes."""
    ours, theirs = dict(_flat(fresh.config)), dict(_flat(found.config))
    result = [
        Difference(
            _config_cause(path, fresh.causes), ".".join(path), _show(given), _show(expected), path
        )
        for path in sorted(ours.keys() | theirs.keys())
        if (given := theirs.get(path)) != (expected := ours.get(path))
    ]
    for name in sorted(found.weights.keys() | fresh.weights.keys()):
        one, other = found.weights.get(name), fresh.weights.get(name)
        if one is None or other is None or not _same(one, other):
            shown = _describe(one, other)
            result.append(Difference(_tensor_cause(name, fresh.causes), name, *shown))
    ranks = order(fresh)
    return sorted(result, key=lambda item: ranks.index(item.cause))


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
    return replace(fresh, config=config, weights=weights)


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


def _declared(path: tuple[str, ...], causes: Mapping[str, str]) -> str | None:
    """Return a method's own cause of a key or a tensor, named in full or by its last part."""
    return causes.get(".".join(path), causes.get(path[-1]))


def _config_cause(path: tuple[str, ...], causes: Mapping[str, str]) -> str:
    if (own := _declared(path, causes)) is not None:
        return own
    last = path[-1].lower()
    if "norm" in last:
        return NORMS
    if any(part.lower().startswith(_ROPE) for part in path) or last == "max_position_embeddings":
        return ROPE
    return VOCABULARY if last == "vocab_size" else OTHER


def _tensor_cause(name: str, causes: Mapping[str, str]) -> str:
    parts = tuple(name.split("."))
    if (own := _declared(parts, causes)) is not None:
        return own
    return NORMS if any("norm" in part.lower() for part in parts) else WEIGHTS


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
