"""States tapped from a model of transformers by forward hooks.

Shapes: B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import CaptureError
from ..types import CaptureSpec
from .asked import check_layers
from .skeleton import find_parts


class _Enough(Exception):
    """Ends a forward pass once everything asked for has been seen."""


@dataclass(slots=True)
class Taps:
    """What `tap_states` saw in the last forward pass."""

    hidden_states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, H]
    final: Tensor | None = None  # [B, T, H], as the spec asked
    normed: Tensor | None = None  # [B, T, H], what the decoder gave the head, where it is needed


@contextmanager
def tap_states(model: nn.Module, spec: CaptureSpec, *, stop: bool) -> Iterator[Taps]:
    """Collect the states that `spec` asks for from one forward pass inside the `with` block.

    With `stop`, the pass ends after the last layer needed, and the block with it:
    its result is only in the Taps.  Raises CaptureError when the model's layers
    are not found, do not fit `spec`, or did not run.
    """
    parts = find_parts(model)
    taps = Taps()
    wanted = set(spec.layers)
    last = len(parts.layers) - 1
    check_layers(spec.layers, len(parts.layers))
    whole = spec.final == "post_norm" or spec.next_tokens or spec.logsumexp
    deepest = last if spec.final != "none" or whole else max(wanted, default=-1)

    def see_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps.hidden_states[-1] = _hidden(args[0] if args else kwargs["hidden_states"])
        if stop and deepest == -1:
            raise _Enough

    def see_layer(index: int, output: Any) -> None:
        if index in wanted:
            taps.hidden_states[index] = _hidden(output)
        if index == last and spec.final == "pre_norm":
            taps.final = _hidden(output)
        if stop and index == deepest and not whole:
            raise _Enough

    def see_decoder(_: nn.Module, __: Any, output: Any) -> None:
        taps.normed = _hidden(output if isinstance(output, Tensor) else output[0])
        if spec.final == "post_norm":
            taps.final = taps.normed
        if stop:
            raise _Enough

    handles = []
    if -1 in {*wanted, deepest}:
        handles.append(parts.layers[0].register_forward_pre_hook(see_input, with_kwargs=True))
    for index in sorted({*wanted, deepest} - {-1}):
        hook = lambda _, __, output, index=index: see_layer(index, output)  # noqa: E731
        handles.append(parts.layers[index].register_forward_hook(hook))
    if whole:
        handles.append(parts.decoder.register_forward_hook(see_decoder))
    try:
        yield taps
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if wanted - set(taps.hidden_states) or (spec.final != "none" and taps.final is None):
        raise CaptureError(
            f"{type(model).__name__} did not run the layers asked for: {sorted(wanted)}, "
            f"final {spec.final}. Choose another target.engine"
        )


def _hidden(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor) or tensor.ndim != 3:
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CaptureError(
            f"a decoder layer put out {shape} where [batch, tokens, hidden] was expected. "
            "Choose another target.engine"
        )
    return tensor
