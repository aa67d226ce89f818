"""Where the states are taken from SGLang's model, and sorted by request.

SGLang's own setter chooses which layers' outputs it hands to its logits processor; an input
hook there sees them together with the normed final state.  What the setter cannot give, the
embedding output and the last layer's, comes from the inputs of the first layer and the final
norm.  All of SGLang's own numbering is in this file.

Shapes: N tokens of a batch, T of one request, H hidden size.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from . import parts
from .ask import PROTOCOL, Ask, parse
from .copies import Copier, Pending
from .frame import pack, pack_error
from .head import summarize
from .parts import Refusal, find_decoder, find_logits_processor, prompt_lengths, states_in
from .sender import Parcel, Sender

logger = logging.getLogger("specforge_sglang_capture")

SETTER = re.compile(r"set_\w+_layers_to_capture")  # each method that SGLang serves has its own
TOLERANCE = 0.02  # relative difference between two ways to the same state


@dataclass(slots=True)
class Seen:
    """What the hooks saw in one forward pass; [N, H] each."""

    asks: list[Ask | None] = field(default_factory=list)  # of each request in the batch
    batch: Any = None
    wanted: frozenset[int] = frozenset()  # layers that some request asks for
    problem: str | None = None
    embedding: Tensor | None = None
    last: Tensor | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)  # what layer i + 1 was given, by i


class Taps:
    """The hooks on one loaded model."""

    def __init__(
        self,
        model: nn.Module,
        num_layers: int,
        writes: bool,
        sender: Sender,
        whole: bool = True,  # no rank has only a part of a state
    ) -> None:
        self.model, self.num_layers, self.writes, self.sender = model, num_layers, writes, sender
        self.seen = Seen()
        self.chosen: tuple[int, ...] = ()  # the layers the setter was last called with
        # layers whose states were not yet compared with what the next layer was given
        self.unproven = set(range(num_layers - 1)) if whole else set()
        self.copier = Copier()
        self.version = version("sglang")  # looked up once: it takes milliseconds
        names = [name for name in dir(type(model)) if SETTER.fullmatch(name)]
        self.setter = getattr(model, names[0]) if names else None
        self.layers, norm = find_decoder(model, num_layers)
        processor = find_logits_processor(model)
        self._signature = inspect.signature(type(processor).forward)
        processor.register_forward_pre_hook(self._see_logits_input, with_kwargs=True)
        if self.layers is not None:
            self.layers[0].register_forward_pre_hook(self._see_first_layer, with_kwargs=True)
            for i, layer in enumerate(self.layers[1:]):
                see = partial(self._see_layer_input, i, inspect.signature(layer.forward))
                layer.register_forward_pre_hook(see, with_kwargs=True)
        if norm is not None:
            norm.register_forward_pre_hook(self._see_norm_input)

    def begin(self, batch: Any) -> None:
        """Look at a batch before it runs, and choose the layers that its requests need."""
        extends = batch.forward_mode.is_extend()
        asks = [parse(rid) for rid in getattr(batch, "rids", None) or ()] if extends else []
        self.seen = Seen(asks, batch, self._wanted(asks)) if any(asks) else Seen()
        inner = tuple(sorted(i for i in self.seen.wanted if 0 <= i < self.num_layers - 1))
        if not inner or inner == self.chosen or self.setter is None:
            return
        for layer in self.layers or ():  # some models mark layers, and never unmark them
            if getattr(layer, "_is_layer_to_capture", False):
                layer._is_layer_to_capture = False  # type: ignore[assignment]
        try:
            self.setter(list(inner))
            self.chosen = inner
        except Exception as exc:  # it would end the server
            logger.exception("the layer setter failed")
            self.seen.problem = f"the layer setter failed: {type(exc).__name__}: {exc}"

    def _wanted(self, asks: Sequence[Ask | None]) -> frozenset[int]:
        given = [ask for ask in asks if ask is not None]
        last = {self.num_layers - 1} if any(ask.final == "pre_norm" for ask in given) else set()
        return frozenset({layer for ask in given for layer in ask.layers} | last)

    def _see_first_layer(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if -1 in self.seen.wanted:
            states = states_in((*args, *kwargs.values()))
            # later layers add to it in place
            self.seen.embedding = states[0].clone() if states else None

    def _see_layer_input(
        self, before: int, signature: inspect.Signature, _: nn.Module, args: Any, kwargs: Any
    ) -> None:
        if before not in self.unproven or before not in self.seen.wanted:
            return
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return
        parts = states_in((given.get("hidden_states"), given.get("residual")))
        if len(parts) == 2:  # else it is kept elsewhere, and there is nothing to compare with
            self.seen.inputs[before] = parts[0] + parts[1]

    def _prove(self, layer: int, state: Tensor, given: Tensor) -> None:
        """Compare a state with the next layer's input, once: some setters hand out less."""
        error = float((state.float() - given.float()).norm() / given.float().norm())
        if not isfinite(error):
            return  # nothing can be said, and what is not finite is refused anyway
        if error > TOLERANCE:
            raise Refusal(
                f"what SGLang {self.version} hands out for layer {layer} of "
                f"{type(self.model).__name__} is not that layer's output ({error:.0%} off). "
                "Use another SGLang version, or target.engine=transformers"
            )
        self.unproven.discard(layer)

    def _see_norm_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self.num_layers - 1 in self.seen.wanted:
            states = states_in(args)  # the output, and its residual if kept
            self.seen.last = sum(states[1:], states[0]) if states else None

    def _see_logits_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen, self.seen = self.seen, Seen()
        if not any(seen.asks):
            return
        given = self._signature.bind(module, *args, **kwargs).arguments
        try:
            head = {}
            if any(ask is not None and ask.head for ask in seen.asks):
                # by every rank: each has a part of the vocabulary
                head = summarize(module, given["lm_head"], given["hidden_states"])
            if not self.writes:
                return
            if seen.problem is not None:
                raise Refusal(seen.problem)
            lengths = prompt_lengths(seen.batch, given["input_ids"])
            states = self._states(seen, given)
            self._hand_over(seen.asks, lengths, given["input_ids"], states, head)
        except Exception as exc:  # never let a capture end the server
            logger.exception("capture failed")
            reason = str(exc) if isinstance(exc, Refusal) else f"{type(exc).__name__}: {exc}"
            for ask in seen.asks:
                if ask is not None and self.writes:
                    self._refuse(ask, reason)

    def _states(self, seen: Seen, given: dict[str, Any]) -> dict[int | str, Tensor]:
        """Return every state this pass gave, by layer; "final" is the normed one."""
        states: dict[int | str, Tensor] = {"final": given["hidden_states"]}
        if seen.embedding is not None:
            states[-1] = seen.embedding
        if seen.last is not None:
            states[self.num_layers - 1] = seen.last
        auxiliary = given.get("aux_hidden_states")
        if self.chosen and auxiliary is not None:
            parts = (
                auxiliary.chunk(len(self.chosen), -1)
                if isinstance(auxiliary, Tensor)
                else list(auxiliary)
            )
            if len(parts) != len(self.chosen):
                raise Refusal(
                    f"SGLang gave {len(parts)} layers where {len(self.chosen)} were asked for"
                )
            states |= dict(zip(self.chosen, parts, strict=True))
            for layer in seen.inputs.keys() & set(self.chosen):
                self._prove(layer, states[layer], seen.inputs[layer])
        return states

    def _hand_over(
        self,
        asks: Sequence[Ask | None],
        lengths: Sequence[int],
        input_ids: Tensor,
        states: dict[int | str, Tensor],
        head: dict[str, Tensor],
    ) -> None:
        needed = {key for ask in asks if ask is not None for key in self._keys(ask)}
        total = sum(lengths)
        for key in needed & states.keys():
            if states[key].ndim != 2 or len(states[key]) != total:
                raise Refusal(
                    f"the state of {_name(key)} is {list(states[key].shape)} for {total} tokens"
                )
        found = {key: states[key] for key in needed & states.keys()}
        order = {key: i for i, key in enumerate(found)}
        # not finite where a value of the row is not: [states, N]
        sound = [(state * 0).sum(-1, dtype=torch.float32) for state in found.values()]
        given: list[tuple[Ask, slice]] = []
        start = 0
        for ask, length in zip(asks, lengths, strict=True):
            rows = slice(start, start + length)
            start += length
            if ask is None:
                continue
            if ask.protocol != PROTOCOL:
                self._refuse(ask, _other_protocol(ask.protocol))
                continue
            if missing := [key for key in self._keys(ask) if key not in found]:
                self._refuse(ask, self._why_missing(missing[0]))
                continue
            given.append((ask, rows))
        if not given:
            return
        bodies = [
            [found[key][rows] for key in self._keys(ask)] + [head[name][rows] for name in ask.head]
            for ask, rows in given
        ]
        whole = [input_ids.to(torch.int64), *([torch.stack(sound)] if sound else [])]
        shared, *copies = self.copier.begin([whole, *bodies])
        for (ask, rows), copy in zip(given, copies, strict=True):
            size = copy.size + 8 * (rows.stop - rows.start)
            self.sender.put(
                Parcel(ask, size, partial(self._pieces, ask, rows, order, shared, copy))
            )

    def _pieces(
        self, ask: Ask, rows: slice, order: dict[int | str, int], shared: Pending, copy: Pending
    ) -> list[memoryview]:
        """Return a frame, once its states are on the host."""
        input_ids, *sound = shared.wait()
        keys, values = self._keys(ask), copy.wait()
        states, head = values[: len(keys)], dict(zip(ask.head, values[len(keys) :], strict=True))
        bad = [key for key in keys if not bool(sound[0][order[key], rows].isfinite().all())]
        named = [f"the state of {_name(key)} is not finite ({states[0].dtype})" for key in bad]
        if "logsumexp" in head and not bool(head["logsumexp"].isfinite().all()):
            named.append(f"the log-sum-exp of the logits is not finite ({states[0].dtype})")
        if named:
            advice = parts.finite_advice(states[0].dtype)
            return pack_error(self._header(ask), f"{named[0]}. {advice}")
        return pack(self._header(ask), input_ids[rows], states, **head)

    def _keys(self, ask: Ask) -> list[int | str]:
        finals: dict[str, list[int | str]] = {
            "none": [],
            "pre_norm": [self.num_layers - 1],
            "post_norm": ["final"],
        }
        return [*ask.layers, *finals[ask.final]]

    def _why_missing(self, key: int | str) -> str:
        model = type(self.model).__name__
        if isinstance(key, int) and not -1 <= key < self.num_layers:
            return f"there is no layer {key} in {model}: it has layers 0 to {self.num_layers - 1}"
        if key in (-1, self.num_layers - 1):
            return f"this SGLang does not show the state of {_name(key)} of {model}"
        if self.setter is None:
            return f"{model} cannot hand out layers: it has no set_..._layers_to_capture"
        return f"{model} did not hand out {_name(key)}"

    def _header(self, ask: Ask) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "name": ask.name,
            "layers": list(ask.layers),
            "final": ask.final,
            "num_layers": self.num_layers,
            "model": type(self.model).__name__,
            "sglang": self.version,
        }

    def _refuse(self, ask: Ask, reason: str) -> None:
        pieces = pack_error(self._header(ask), reason)
        self.sender.put(Parcel(ask, 0, lambda: pieces))


def _name(key: int | str) -> str:
    named: dict[int | str, str] = {-1: "the embedding", "final": "the final norm"}
    return named.get(key, f"layer {key}")


def _other_protocol(asked: int) -> str:
    older, where = ("server", "SGLang runs") if asked > PROTOCOL else ("trainer", "specforge runs")
    return (
        f"specforge-sglang speaks protocol {PROTOCOL} in the server and {asked} in the trainer. "
        f"The {older}'s is older; try: pip install -U specforge-sglang where {where}"
    )
