"""One numeric proof of a loaded target: what is captured is what the model itself computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, ConfigError, SpecForgeError
from ..text import cut
from ..types import CaptureSpec, TargetInfo
from .asked import finite_advice
from .head import Head
from .skeleton import find_parts
from .taps import tap_states
from .weights import embedding_scale

TOKENS = 12
LEAK = 0.02  # of a state: experts may be summed in another order where one more token goes to one
HOOKED = "_output_capturing_hooks_installed"  # transformers' own note that it did
ROUNDING = 8  # steps of the weights' dtype: the same pass through the same layers


def prove(model: Any, info: TargetInfo) -> Head:
    """Run a few tokens; compare captured layers with the model's own, and head(final) with logits.

    Returns the head that was proved.  Raises CaptureError that says what differs, and by how much,
    and ConfigError where the model cannot be run.
    """
    try:
        return _prove(model, info)
    except (SpecForgeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # the code of any model, with a config that may not fit it
        reason = cut(" ".join(f"{type(exc).__name__}: {exc}".split()), 300).rstrip(".")
        raise ConfigError(
            f"target.path {info.name_or_path!r} ({type(model).__name__}) cannot be run: {reason}. "
            "Correct its config.json, download it again, or choose another target.path"
        ) from exc


@torch.no_grad()
def _prove(model: Any, info: TargetInfo) -> Head:
    parts, name = find_parts(model), type(model).__name__
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(info.vocab_size, (1, TOKENS), generator=draw).to(model.device)
    layers = tuple(range(-1, len(parts.layers)))
    spec = CaptureSpec(layers=layers, final="post_norm", fields={})
    with tap_states(model, spec, stop=False) as taps:
        parts.decoder(input_ids=ids, use_cache=False)
    assert taps.normed is not None
    _check_finite([taps.hidden_states[layer] for layer in layers], taps.normed, name)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % info.vocab_size
    with tap_states(model, spec, stop=False) as again:
        parts.decoder(input_ids=other, use_cache=False)
    assert again.normed is not None
    _check_causal(again.normed[:, :-1], taps.normed[:, :-1], name)
    _check_embeddings(taps.hidden_states[-1], parts.embedding, ids, info, name)
    with _unhooked(model):
        own = parts.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    listed = getattr(own, "hidden_states", None) or ()
    _check_layers([taps.hidden_states[layer] for layer in layers], listed, name)
    logits = model(input_ids=ids, use_cache=False).logits[..., : info.vocab_size]
    head = Head.of_model(model, info)
    error = relative_error(head.logits(taps.normed), logits)
    limit = rounding_limit(logits)
    if not error <= limit:
        raise CaptureError(
            f"the logits of {name} differ by {error:.2%} from what its head makes of the captured "
            f"final state (at most {limit:.2%} is rounding): it does more behind its "
            "decoder than a matrix, a bias, a scale and a softcap. Choose another target.path"
        )
    return head


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Take out afterwards what transformers hooks in to list states: it cannot be compiled."""
    before = [(m, set(m._forward_hooks), HOOKED in vars(m)) for m in model.modules()]
    yield
    for module, hooks, hooked in before:
        for key in module._forward_hooks.keys() - hooks:
            del module._forward_hooks[key]
        if not hooked:
            vars(module).pop(HOOKED, None)


def _check_finite(states: Sequence[Tensor], final: Tensor, name: str) -> None:
    """Raise CaptureError naming the first layer that puts out a NaN or an infinity."""
    for layer, found in enumerate([*states, final], -1):
        if not bool(found.isfinite().all()):
            where = f"layer {layer}" if layer < len(states) - 1 else "the final norm"
            where = "the embedding" if layer < 0 else where
            raise CaptureError(
                f"{where} of {name} puts out values that are not finite in {found.dtype}. "
                f"{finite_advice(found.dtype)}"
            )


def _check_causal(found: Tensor, given: Tensor, name: str) -> None:
    """Raise CaptureError where states of tokens change with a later token: padding is one, too."""
    error = relative_error(found, given)
    if not error <= max(rounding_limit(given), LEAK):
        raise CaptureError(
            f"the states of {name} change by {error:.2%} with a token that stands behind them: it "
            "does not write from left to right. Choose another target.path"
        )


def _check_embeddings(
    state: Tensor, embedding: Any, ids: Tensor, info: TargetInfo, name: str
) -> None:
    """Compare the factor that embeddings are known to be scaled by with what the model does.

    Not where more is done to them: learned positions, a norm.
    """
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != state.shape[-1]:
        return
    rows = weight[ids].double()
    found = state.double()
    factor = float((rows * found).sum() / (rows * rows).sum())
    known = embedding_scale(info)
    if (
        relative_error(factor * rows, found) <= rounding_limit(state)
        and abs(factor / known - 1) > 0.01
    ):
        raise CaptureError(
            f"{name} multiplies its embeddings by {factor:.5g}, where its config says {known:.5g}: "
            "a draft would read others. Choose another target.path"
        )


def _check_layers(states: Sequence[Tensor], listed: Sequence[Tensor], name: str) -> None:
    """Compare states before and behind every layer with the model's list of them.

    The last one is left out, since models list it normed.  Some families do not list the
    embedding.
    """
    if len(listed) not in (len(states), len(states) - 1):
        raise CaptureError(
            f"{name} ran {len(states) - 1} layers and lists {len(listed)} hidden states, so what "
            "was captured cannot be proved. Choose another target.path"
        )
    first = len(states) - len(listed)
    if first == 0 and relative_error(states[0], listed[0]) > rounding_limit(listed[0]):
        first = 1
    for layer, (found, given) in enumerate(zip(states[first:-1], listed, strict=False), first - 1):
        error = relative_error(found, given)
        if not error <= rounding_limit(given):
            raise CaptureError(
                f"layer {layer} as captured differs by {error:.2%} from what {name} lists as its "
                f"hidden state (at most {rounding_limit(given):.2%} is rounding). "
                "Choose another target.engine or target.path"
            )


def rounding_limit(given: Tensor) -> float:
    """Return the relative error that is rounding, of states in that dtype."""
    return float(ROUNDING * torch.finfo(given.dtype).eps)


def relative_error(found: Tensor, given: Tensor) -> float:
    """Return the norm of the difference over that of what is given."""
    if found.shape != given.shape:
        return float("inf")
    wide = given.double().to(found.device)
    norm = wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - wide).norm() / norm)
