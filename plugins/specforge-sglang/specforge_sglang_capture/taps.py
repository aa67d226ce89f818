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
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .ask import Ask, parse
from .frame import pack, pack_error
from .sender import Parcel, Sender

logger = logging.getLogger("specforge_sglang_capture")

SETTERS = ("set_dflash_layers_to_capture", "set_eagle3_layers_to_capture")
NORMS = ("norm", "final_layernorm", "ln_f", "norm_f", "final_norm")
ATTRIBUTE = "_specforge_taps"


class Refusal(Exception):
    """Why a request's states cannot be given."""


@dataclass(slots=True)
class Seen:
    """What the hooks saw in one forward pass; [N, H] each."""

    asks: list[Ask | None] = field(default_factory=list)  # of each request in the batch
    batch: Any = None
    embedding: Tensor | None = None
    last: Tensor | None = None


class Taps:
    """The hooks on one loaded model."""

    def __init__(self, model: nn.Module, num_layers: int, writes: bool, sender: Sender) -> None:
        self.model, self.num_layers, self.writes, self.sender = model, num_layers, writes, sender
        self.seen = Seen()
        self.chosen: tuple[int, ...] = ()  # the layers the setter was last called with
        self.stream: Any = None  # for copies to the host
        self.setter = next((getattr(model, n) for n in SETTERS if hasattr(model, n)), None)
        self.layers, norm = _find_decoder(model, num_layers)
        processor = _find_logits_processor(model)
        self._signature = inspect.signature(type(processor).forward)
        processor.register_forward_pre_hook(self._see_logits_input, with_kwargs=True)
        if self.layers is not None:
            self.layers[0].register_forward_pre_hook(self._see_first_layer, with_kwargs=True)
        if norm is not None:
            norm.register_forward_pre_hook(self._see_norm_input)

    @property
    def _wanted(self) -> set[int]:
        asks = [ask for ask in self.seen.asks if ask is not None]
        last = {self.num_layers - 1} if any(a.final == "pre_norm" for a in asks) else set()
        return {layer for ask in asks for layer in ask.layers} | last

    def begin(self, batch: Any) -> None:
        """Look at a batch before it runs, and choose the layers that its requests need."""
        asks = [parse(rid) for rid in getattr(batch, "rids", None) or ()]
        extends = batch.forward_mode.is_extend()
        self.seen = Seen(asks, batch) if extends and any(asks) else Seen()
        inner = tuple(sorted(i for i in self._wanted if 0 <= i < self.num_layers - 1))
        if not inner or inner == self.chosen or self.setter is None:
            return
        for layer in self.layers or ():  # some models mark layers, and never unmark them
            if getattr(layer, "_is_layer_to_capture", False):
                layer._is_layer_to_capture = False  # type: ignore[assignment]
        self.setter(list(inner))
        self.chosen = inner

    def _see_first_layer(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if -1 in self._wanted:
            states = [a for a in (*args, *kwargs.values()) if _is_states(a)]
            # later layers add to it in place
            self.seen.embedding = states[0].clone() if states else None

    def _see_norm_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self.num_layers - 1 in self._wanted:
            states = [a for a in args if _is_states(a)]  # the output, and its residual if kept
            self.seen.last = sum(states[1:], states[0]) if states else None

    def _see_logits_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen, self.seen = self.seen, Seen()
        if not any(seen.asks) or not self.writes:
            return
        given = self._signature.bind(module, *args, **kwargs).arguments
        try:
            lengths = _lengths(seen.batch, given["input_ids"])
            states = self._states(seen, given)
            self._hand_over(seen.asks, lengths, given["input_ids"], states)
        except Exception as exc:  # never let a capture end the server
            logger.exception("capture failed")
            reason = str(exc) if isinstance(exc, Refusal) else f"{type(exc).__name__}: {exc}"
            for ask in seen.asks:
                if ask is not None:
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
        return states

    def _hand_over(
        self,
        asks: Sequence[Ask | None],
        lengths: Sequence[int],
        input_ids: Tensor,
        states: dict[int | str, Tensor],
    ) -> None:
        needed = {key for ask in asks if ask is not None for key in self._keys(ask)}
        total = sum(lengths)
        for key in needed & states.keys():
            if states[key].ndim != 2 or len(states[key]) != total:
                raise Refusal(
                    f"the state of {_name(key)} is {list(states[key].shape)} for {total} tokens"
                )
        found, ready = self._to_host({key: states[key] for key in needed & states.keys()})
        ids = input_ids.to("cpu", torch.int64, copy=True)
        start = 0
        for ask, length in zip(asks, lengths, strict=True):
            rows = slice(start, start + length)
            start += length
            if ask is None:
                continue
            if missing := [key for key in self._keys(ask) if key not in found]:
                self._refuse(ask, self._why_missing(missing[0]))
                continue
            chosen = [found[key][rows] for key in self._keys(ask)]
            header = self._header(ask)

            def pieces(
                header: dict[str, Any] = header, rows: slice = rows, chosen: list[Tensor] = chosen
            ) -> list[memoryview]:
                if ready is not None:
                    ready.synchronize()
                return pack(header, ids[rows], [state.contiguous() for state in chosen])

            size = sum(state.nbytes for state in chosen) + 8 * length
            self.sender.put(Parcel(ask, size, pieces))

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
            return f"{model} cannot hand out layers: it has none of {', '.join(SETTERS)}"
        return f"{model} did not hand out {_name(key)}"

    def _header(self, ask: Ask) -> dict[str, Any]:
        return {
            "name": ask.name,
            "layers": list(ask.layers),
            "final": ask.final,
            "num_layers": self.num_layers,
            "model": type(self.model).__name__,
            "sglang": version("sglang"),
        }

    def _refuse(self, ask: Ask, reason: str) -> None:
        pieces = pack_error(self._header(ask), reason)
        self.sender.put(Parcel(ask, 0, lambda: pieces))

    def _to_host(self, states: dict[int | str, Tensor]) -> tuple[dict[int | str, Tensor], Any]:
        """Begin to copy states to the host; the event says when they are there."""
        if all(state.device.type != "cuda" for state in states.values()):
            return {key: state.cpu() for key, state in states.items()}, None
        if self.stream is None:
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream())
        copies: dict[int | str, Tensor] = {}
        with torch.cuda.stream(self.stream):
            for key, state in states.items():
                copies[key] = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
                copies[key].copy_(state, non_blocking=True)
                state.record_stream(self.stream)
            return copies, self.stream.record_event()


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _name(key: int | str) -> str:
    named: dict[int | str, str] = {-1: "the embedding", "final": "the final norm"}
    return named.get(key, f"layer {key}")


def _lengths(batch: Any, input_ids: Tensor) -> list[int]:
    """Return the tokens of each request in the batch; Refusal when it holds parts of prompts."""
    lengths = [int(n) for n in batch.extend_seq_lens_cpu]
    cached = [int(n) for n in batch.extend_prefix_lens_cpu]
    if any(cached):
        raise Refusal(
            f"{max(cached)} tokens of a prompt were not run: they came from the radix cache or "
            "an earlier chunk. Start SGLang with --disable-radix-cache --chunked-prefill-size -1"
        )
    if sum(lengths) != len(input_ids):
        raise Refusal(f"the batch holds {len(input_ids)} tokens for prompts of {sum(lengths)}")
    return lengths


def _find_decoder(model: nn.Module, num_layers: int) -> tuple[nn.ModuleList | None, Any]:
    for module in model.modules():
        layers = getattr(module, "layers", None)
        norm = next((getattr(module, n) for n in NORMS if hasattr(module, n)), None)
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers and norm is not None:
            return layers, norm
    return None, None


def _find_logits_processor(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessor":
            return module
    raise Refusal(f"{type(model).__name__} has no LogitsProcessor")


_sender: Sender | None = None


def after_load_model(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Install the hooks on the model that a runner has just loaded."""
    global _sender
    if getattr(runner, "is_draft_worker", False):
        return
    _sender = _sender or Sender()
    taps = Taps(
        runner.model,
        int(runner.model_config.num_hidden_layers),
        int(getattr(runner, "tp_rank", 0)) == 0,
        _sender,
    )
    setattr(runner, ATTRIBUTE, taps)


def before_forward(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Let the hooks see the batch that a runner is about to run."""
    taps = getattr(runner, ATTRIBUTE, None)
    batch = args[0] if args else kwargs.get("forward_batch")
    if taps is not None and batch is not None:
        taps.begin(batch)
