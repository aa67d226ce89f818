"""What hooks return, looked at field by field: each function says what is wrong, and what fits.

A wrong value is told where it comes back, with its package; later it would be an AttributeError
somewhere in the core, or go unnoticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from .text import shorten
from .types import CaptureSpec, Draft, Export, Field, FinalState, Generated, Proposal, TargetCapture

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Wrong = tuple[str, str]  # what was returned, and what was expected
Check = tuple[Callable[[Any], bool], str]


def _wrong(value: object, checks: Mapping[str, Check]) -> Wrong | None:
    for name, (fits, expected) in checks.items():
        found = getattr(value, name)
        if not fits(found):
            return f"{type(value).__name__} with {name} {shorten(found)}", expected
    return None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _truth(value: object) -> bool:
    return isinstance(value, bool)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _by_name(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(_text(k) and fits(v) for k, v in value.items())


def _json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping)


def _tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _dense(value: Any) -> bool:
    """Say whether a value is a tensor that can be saved: on the meta device one has no data."""
    dense = _tensor(value) and str(value.layout) == "torch.strided"
    return dense and value.device.type != "meta"


def _on_host(value: Any) -> bool:
    return _tensor(value) and value.device.type == "cpu"


def _field(value: object) -> bool:
    import torch

    return (
        isinstance(value, Field)
        and isinstance(value.shape, tuple)
        and all(n is None or (_whole(n) and n >= 0) for n in value.shape)
        and _text(value.dtype)
        and isinstance(getattr(torch, value.dtype, None), torch.dtype)
    )


def wrong_type(value: object, kind: type, expected: str) -> Wrong | None:
    """Say what a value is that is of another type."""
    return None if isinstance(value, kind) else (shorten(value), expected)


def wrong_spec(spec: CaptureSpec, num_layers: int) -> Wrong | None:
    """Say what is wrong with a CaptureSpec for a target of `num_layers` layers."""

    def layers(value: Any) -> bool:
        whole = isinstance(value, tuple) and all(map(_whole, value))
        return whole and all(-1 <= layer < num_layers for layer in value)

    shape = "a Field by name: a shape of numbers and None, and the name of a torch dtype"
    return _wrong(
        spec,
        {
            "layers": (layers, f"a tuple of layers from -1 to {num_layers - 1}"),
            "final": (lambda v: v in get_args(FinalState), f"one of {get_args(FinalState)}"),
            "fields": (lambda v: _by_name(v, _field), shape),
            "next_tokens": (_truth, "True or False"),
            "logsumexp": (_truth, "True or False"),
            "version": (_whole, "a whole number"),
        },
    )


def wrong_tensors(value: object) -> Wrong | None:
    """Say what is wrong with a sample or a batch: it holds tensors by name."""
    if not isinstance(value, dict):
        return type(value).__name__, "a dict of tensors"
    for name, tensor in value.items():
        if not _text(name) or not _tensor(tensor):
            return f"a dict with {shorten(name)}: {type(tensor).__name__}", "tensors by name"
        if tensor.is_meta:
            return f"a dict with {shorten(name)}: a tensor on the meta device", "tensors with data"
    return None


def wrong_capture(found: object, spec: CaptureSpec) -> Wrong | None:
    """Say what a TargetCapture lacks of what a spec asks for."""
    if not isinstance(found, TargetCapture):
        return type(found).__name__, "TargetCapture"

    def row(value: Any) -> bool:
        return _on_host(value) and value.shape == found.input_ids.shape

    def states(value: Any) -> bool:
        rows = len(found.input_ids)
        return _tensor(value) and value.ndim == 2 and len(value) == rows

    def every(value: object) -> bool:
        return isinstance(value, Mapping) and all(states(value.get(i)) for i in spec.layers)

    tokens = "one number for each token, as the spec asks"
    checks: dict[str, Check] = {
        "index": (_whole, "the prompt's"),
        "input_ids": (lambda v: _on_host(v) and v.ndim == 1, "the prompt's tensor [T]"),
        "loss_mask": (row, "the prompt's tensor [T]"),
        "hidden_states": (every, f"states [T, H] of the layers {list(spec.layers)}"),
    }
    if spec.final != "none":
        checks["final"] = (states, f"states [T, H], {spec.final}")
    if spec.next_tokens:
        checks["next_tokens"] = (row, tokens)
    if spec.logsumexp:
        checks["logsumexp"] = (row, tokens)
    return _wrong(found, checks)


def wrong_generated(found: object) -> Wrong | None:
    """Say what is wrong with an answer."""
    if not isinstance(found, Generated):
        return type(found).__name__, "Generated"
    return _wrong(
        found,
        {
            "index": (_whole, "the prompt's"),
            "tokens": (lambda v: isinstance(v, tuple) and all(map(_whole, v)), "a tuple of ids"),
            "finished": (_truth, "True or False"),
            "refused": (lambda v: v is None or _text(v), "a text or None"),
            "retokenized": (_truth, "True or False"),
        },
    )


def wrong_proposal(found: object) -> Wrong | None:
    """Say what is wrong with the types of a proposal; its values depend on what was asked."""
    if not isinstance(found, Proposal):
        return type(found).__name__, "Proposal"

    def numbers(value: Any) -> bool:
        return _tensor(value) and value.ndim == 1 and str(value.dtype) == "torch.int64"

    return _wrong(
        found,
        {
            "tokens": (numbers, "a tensor [K] int64"),
            "probs": (lambda v: v is None or _tensor(v), "a tensor [K, V] or None"),
            "parents": (lambda v: v is None or numbers(v), "a tensor [K] int64 or None"),
        },
    )


def wrong_draft(draft: Draft) -> Wrong | None:
    """Say what is wrong with a new draft."""
    from torch import nn

    if not isinstance(draft.model, nn.Module):
        return f"Draft with model {shorten(draft.model)}", "a module"
    inside = {id(module) for module in draft.model.modules()}

    def units(value: object) -> bool:
        return isinstance(value, tuple) and all(id(unit) in inside for unit in value)

    def below(value: object) -> bool:  # the root is sharded anyway
        return isinstance(value, tuple) and units(value) and draft.model not in value

    wrong = _wrong(
        draft,
        {
            "frozen": (lambda v: v is None or isinstance(v, nn.Module), "a module or None"),
            "shard": (below, "a tuple of modules inside of the model"),
            "compile": (lambda v: v is None or units(v), "a tuple of the model's modules"),
            "hidden": (lambda v: v is None or units(v), "a tuple of the model's modules"),
            "saved": (callable, "a function of a name"),
            "decayed": (callable, "a function of a name"),
            "resolved": (_json, "values by name that JSON can write"),
        },
    )
    return wrong or _wrong_parameters(draft)


def _wrong_parameters(draft: Draft) -> Wrong | None:
    trained = {n: p for n, p in draft.model.named_parameters() if p.requires_grad}
    if not trained:
        return type(draft.model).__name__, "a model with parameters that are trained"
    if odd := [name for name, p in trained.items() if not p.is_floating_point()]:
        return f"a model with {odd[0]} of {trained[odd[0]].dtype}", "real parameters"
    if empty := [name for name, p in draft.model.named_parameters() if p.is_meta]:
        return f"a model with {empty[0]} on the meta device", "parameters that have values"
    frozen = () if draft.frozen is None else draft.frozen.parameters()
    shared = {id(p) for p in trained.values()} & {id(p) for p in frozen}
    if names := [name for name, p in trained.items() if id(p) in shared]:
        return f"Draft with {names[0]} in both model and frozen", "what is trained in one of them"
    named = draft.model.named_parameters(remove_duplicate=False)
    kept = {id(p) for name, p in named if draft.saved(name)}
    if lost := [name for name, p in trained.items() if id(p) not in kept]:
        return f"Draft whose saved leaves out {lost[0]}", "what is trained to be saved"
    return None


def wrong_export(export: Export) -> Wrong | None:
    """Say what is wrong with an export."""
    return _wrong(
        export,
        {
            "config": (_json, "values by name that JSON can write, for config.json"),
            "weights": (
                lambda v: _by_name(v, _dense) and len(v) > 0,
                "dense tensors with data, by name",
            ),
            "files": (lambda v: _by_name(v, lambda f: isinstance(f, bytes)), "bytes by name"),
            "serve": (
                lambda v: _by_name(v, lambda options: _by_name(options, lambda _: True)),
                "options by engine, each by name",
            ),
            "environment": (
                lambda v: _by_name(v, lambda names: _by_name(names, _text)),
                "variables by engine, each a text",
            ),
            "causes": (lambda v: _by_name(v, _text), "a text by key"),
            "base": (lambda v: v is None or _text(v), "a model's name or None"),
        },
    )


def wrong_optimizers(found: Iterable[Optimizer], model: nn.Module) -> Wrong | None:
    """Say what is wrong with optimizers: each trained parameter is in one of them, once."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    seen: set[int] = set()
    for optimizer in found:
        groups: Any = optimizer.param_groups
        kind = type(optimizer).__name__
        if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
            return f"{kind} with param_groups {shorten(groups)}", "a list of groups"
        for group in groups:
            peak = group.get("lr")
            if not isinstance(peak, float | int) and not _tensor(peak):
                return f"{kind} with a group of lr {shorten(peak)}", "its peak, a number"
            if not 0 <= float(peak) < math.inf:
                return f"{kind} with a group of lr {float(peak)}", "its peak, 0 or more"
            here = [id(p) for p in group["params"]]
            if strange := len([p for p in here if p not in trained]):
                return f"{kind} with {strange} parameters that are not the draft's", "its own"
            if twice := [trained[p] for p in here if p in seen]:
                return f"{kind} with {twice[0]}, which another group has", "every parameter once"
            seen.update(here)
    if left := [name for key, name in trained.items() if key not in seen]:
        return f"optimizers without {left[0]}", "every trained parameter in one of them"
    return None
