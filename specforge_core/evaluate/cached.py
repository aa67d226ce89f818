"""The target on one sequence, with a past that can be taken back.

Attention keeps every token's keys and values, so rejected ones are cropped.  A recurrent state
cannot be cropped: it is saved before a verification and restored after it, and the accepted
tokens run again.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from ..errors import ConfigError
from ..target.taps import tap_states
from ..types import CaptureSpec, TargetCapture
from .past import PROBE, Abilities, equal, forward, new_cache, positions_from, probe, probe_tokens
from .tree import ancestors, keep_path, leaves, tree_inputs

_ABILITIES: WeakKeyDictionary[Any, Abilities] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the past was at one place."""

    length: int
    states: list[dict[str, dict[int, Any]]]  # of each recurrent layer
    own: Any = None  # a copy of a cache that the model made itself
    outside: tuple[tuple[Any, str, Tensor], ...] = ()  # module, attribute and what it was


class CachedTarget:
    """The target on one sequence, with its cache.

    The cache keeps every layer's whole past, sliding windows included (their masks
    do the sliding), because a window that has moved on cannot be rolled back.
    """

    def __init__(self, model: Any, spec: CaptureSpec | None) -> None:
        self.model = model
        self.spec = spec
        self.able = abilities(model)
        self.cache: Any = None if self.able.own else new_cache(model)
        self.length = 0  # tokens in the cache
        self.runs = 0  # of the model
        self._saved: _Saved | None = None

    def run(
        self, tokens: Sequence[int], keep: int, parents: Sequence[int] | None = None
    ) -> tuple[Tensor, TargetCapture | None]:
        """Append tokens; return the logits [keep, V] of the last ones, and all states.

        With `parents`, the tokens behind the first are a tree.  Call `settle` afterwards where
        some may be rejected.
        """
        going_on = self.length > 0 and len(tokens) > 1
        self._saved = self._save() if going_on and self.able.recurrent else None
        if parents is not None and not self.able.trees:
            return self._by_paths(tokens, parents)
        extra = {} if parents is None else tree_inputs(parents, self.length, self.model)
        return self._append(tokens, keep, extra)

    def settle(self, tokens: Sequence[int], kept: Sequence[int], tree: bool) -> None:
        """Leave in the cache, of the tokens just run, the first and those at 1 + `kept`."""
        if len(kept) == len(tokens) - 1 and not tree:
            return
        if not self.able.recurrent and (self.able.trees or not tree):
            if tree:
                keep_path(self.cache, self.length - len(tokens), kept)
            self.forget(len(tokens) - 1 - len(kept))
            return
        if self._saved is not None:
            self._restore(self._saved)
            self._append([tokens[0], *(tokens[1 + i] for i in kept)], 1, {}, states=False)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens' keys and values from the cache."""
        self.length -= count
        for layer in self.cache.layers if count else ():
            if getattr(layer, "keys", None) is not None:
                recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
                crop = DynamicLayer.crop if recurrent else type(layer).crop
                crop(layer, -count)

    def _by_paths(
        self, tokens: Sequence[int], parents: Sequence[int]
    ) -> tuple[Tensor, TargetCapture | None]:
        """Run every path of a tree as a chain: a recurrent state follows one path alone.

        None of them stays in the cache; `settle` runs the one that is kept.
        """
        self._saved = saved = self._save()
        rows: dict[int, tuple[Tensor, TargetCapture | None, int]] = {}
        for leaf in leaves(parents):
            path = ancestors(parents, leaf)
            chain = [tokens[0], *(tokens[1 + i] for i in path)]
            logits, states = self._append(chain, len(chain), {})
            for place, row in enumerate([0, *(1 + i for i in path)]):
                rows.setdefault(row, (logits, states, place))
            self._restore(saved)
        found = [rows[row] for row in range(len(tokens))]
        all_logits = torch.stack([logits[place] for logits, _, place in found])
        if self.spec is None:
            return all_logits, None
        captures = [(states, place) for _, states, place in found if states is not None]
        joined = self._capture(
            torch.tensor(list(tokens), device=self.model.device),
            {
                i: torch.stack([states.hidden_states[i][place] for states, place in captures])
                for i in self.spec.layers
            },
            None
            if self.spec.final == "none"
            else torch.stack([s.final[place] for s, place in captures if s.final is not None]),
        )
        return all_logits, joined

    def _append(
        self, tokens: Sequence[int], keep: int, extra: dict[str, Tensor], *, states: bool = True
    ) -> tuple[Tensor, TargetCapture | None]:
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self.model.device)
        parts = [ids] if self.able.many or not self.length else list(torch.split(ids, 1, dim=1))
        logits, layers, finals = [], [], []
        for part in parts:
            wanted = keep if len(parts) == 1 else 1
            told = self.able.positions and not extra
            extra_here = positions_from(self.length, part) if told else extra
            if self.spec is None or not states:
                logits.append(self._forward(part, wanted, extra_here))
            else:
                wanted = part.shape[1] if self.able.cuts else wanted
                with tap_states(self.model, self.spec, stop=False) as tap:
                    logits.append(self._forward(part, wanted, extra_here))
                layers.append(tap.hidden_states)
                finals.append(tap.final)
            self.length += part.shape[1]
            self.runs += 1
        found = torch.cat(logits)[-keep:]
        if self.spec is None or not states:
            return found, None
        joined = {i: torch.cat([part[i][0] for part in layers]) for i in self.spec.layers}
        last = [final[0] for final in finals if final is not None]
        return found, self._capture(ids[0], joined, torch.cat(last) if last else None)

    def _forward(self, ids: Tensor, keep: int, extra: dict[str, Tensor]) -> Tensor:
        logits, self.cache = forward(self.model, ids, self.cache, keep, extra)
        return logits

    def _capture(
        self, ids: Tensor, states: dict[int, Tensor], final: Tensor | None
    ) -> TargetCapture:
        ones = torch.ones_like(ids)
        return TargetCapture(
            index=0, input_ids=ids, loss_mask=ones, hidden_states=states, final=final
        )

    def _save(self) -> _Saved:
        if self.able.own:
            return _Saved(self.length, [], copy.deepcopy(self.cache))
        outside = _tensors(self.model) if self.able.outside else ()
        return _Saved(
            self.length,
            [
                {name: _copied(getattr(layer, name)) for name in _STATES}
                for layer in self.cache.layers
                if isinstance(layer, LinearAttentionCacheLayerMixin)
            ],
            outside=tuple((module, name, value.clone()) for module, name, value in outside),
        )

    def _restore(self, saved: _Saved) -> None:
        if self.able.own:
            self.cache, self.length = copy.deepcopy(saved.own), saved.length
            return
        self.forget(self.length - saved.length)
        for module, name, value in saved.outside:
            setattr(module, name, value.clone())
        recurrent = (c for c in self.cache.layers if isinstance(c, LinearAttentionCacheLayerMixin))
        for layer, states in zip(recurrent, saved.states, strict=True):
            for name, values in states.items():
                setattr(layer, name, _copied(values))


_STATES = ("conv_states", "recurrent_states", "has_previous_state")


def _copied(values: dict[int, Any]) -> dict[int, Any]:
    return {i: v.clone() if isinstance(v, Tensor) else v for i, v in values.items()}


def abilities(model: Any) -> Abilities:
    """Return how a model goes on from its cache, found once per model.

    Raises ConfigError where it does not go on as a pass over all tokens would, or where its past
    cannot be taken back.
    """
    if model not in _ABILITIES:
        _ABILITIES[model] = probe(model)
        if not _goes_back(model):
            _ABILITIES[model] = replace(_ABILITIES[model], recurrent=True, outside=True)
        if not _goes_back(model):
            del _ABILITIES[model]
            raise ConfigError(
                f"target {model.config.name_or_path!r} keeps a state that cannot be taken back "
                "after a rejected draft. Evaluate it in a serving engine"
            )
    return _ABILITIES[model]


def share_abilities(model: Any, twin: Any) -> None:
    """Let a copy of a model that shares its weights be known to do the same."""
    _ABILITIES[twin] = abilities(model)


@torch.inference_mode()
def _goes_back(model: Any) -> bool:
    ids = probe_tokens(model)[0].tolist()
    whole, _ = CachedTarget(model, None).run(ids, PROBE - 1)
    target = CachedTarget(model, None)
    target.run(ids[:PROBE], 1)
    wrong = [ids[PROBE], *ids[:3]]
    target.run(wrong, len(wrong))
    target.settle(wrong, (), tree=False)
    again, _ = target.run(ids[PROBE + 1 :], PROBE - 1)
    return equal(again, whole)


def _tensors(model: Any) -> list[tuple[Any, str, Tensor]]:
    """Return what modules keep from one pass to the next as plain attributes."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
