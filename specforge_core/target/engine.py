"""The target in this process, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from ..compiled import compiled, swapped
from ..config import TargetConfig
from ..cpu import pick_target_dtype
from ..errors import CaptureError, ConfigError
from ..types import CaptureSpec, Generated, GenerateOptions, Prompt, TargetCapture, TargetInfo
from .asked import answer_room, check_prompts, finite_advice
from .batching import fill_in_order, group_by_length, least_tokens, rope_turn
from .generate import answer_batch
from .head import Head
from .info import load_pretrained, load_target_info
from .loaded import check_loaded, stored_dtypes
from .proof import prove
from .quantised import PLAIN, as_plain, check_method, loading, quant_method, widen_weights
from .skeleton import auto_class, find_parts, text_model
from .taps import Taps, tap_states
from .varlen import PackedRuns
from .varlen_proof import why_padded

# Arguments of from_pretrained that `target` has keys for, or that are decided here
RESERVED = frozenset(
    ("auto", "target", "pretrained_model_name_or_path", "revision", "trust_remote_code", "dtype")
) | {"torch_dtype", "output_loading_info", "ignore_mismatched_sizes"}

PACKING = {"cuda"}  # devices that have a kernel for sequences of several lengths


class TransformersEngine:
    """A TargetEngine in this process.

    Its captures are slices of one batch: of one row where that is proved right, which the first
    capture does, and padded on the right elsewhere.
    """

    def __init__(
        self,
        model: Any,
        info: TargetInfo,
        head: Head,
        batch_tokens: int,
        *,
        compile: bool = False,
        padded: str | None = "packing was not asked for",
    ) -> None:
        """`padded`: why captures are, "" where they are packed; None: see `why_padded`."""
        self.model = model
        self.info = info
        parts = find_parts(model)
        self._decoder: Any = parts.decoder
        self._head = head
        self._batch_tokens = batch_tokens
        self._padded = padded
        counts = len(parts.layers), sum(p.numel() for p in model.parameters())
        self._least = least_tokens(model.device.type, *counts)
        self._turn = rope_turn(model.config)
        # not for answers: each layer's cache would be a graph of its own
        layers = parts.layers if compile else ()
        self._compiled = [(layer, compiled(layer.forward)) for layer in layers]

    @classmethod
    def load(cls, target: TargetConfig, device: torch.device) -> TransformersEngine:
        """Load the target's weights onto a device; ConfigError when that fails."""
        info = load_target_info(target)
        pinned = target.model_copy(update={"revision": info.revision})  # the branch may move on
        # evaluation runs the target here whatever engine captures: its options are not for this one
        own = dict(target.options) if target.engine == "transformers" else {}
        compiles = own.pop("compile", False)
        if compiles not in (True, False) or (compiles and device.type != "cuda"):
            raise ConfigError(
                f"target.options.compile is {compiles!r}: it is true or false, and true is for "
                f"GPUs alone, where this target is on {device.type}. Try: target.options={{}}"
            )
        if taken := sorted(own.keys() & RESERVED):
            raise ConfigError(
                f"target.options.{taken[0]} is not for the engine transformers: it is decided "
                "elsewhere in the section target. Take it out"
            )
        config = load_pretrained(AutoConfig, pinned)
        dtype = pick_target_dtype(target.dtype, info.config.get("dtype"), device)
        method = quant_method(config)
        # sizes that do not fit are named below, with the tensor's name
        options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if method is not None:
            check_method(method, target.path)
        stored = stored_dtypes(info)  # before transformers follows what an index says
        with loading(method, target.path):
            options |= as_plain(method)
            model, report = load_pretrained(auto_class(config), pinned, **options | own)
        check_loaded(model, report, info, stored, method)
        model = text_model(model)
        with loading(method, target.path):
            model.eval().requires_grad_(False)
            if method in PLAIN and dtype != "auto":
                widen_weights(model, getattr(torch, dtype))
            model.to(device)
            head = prove(model, info)
            why: str | None = None
            if device.type not in PACKING:
                why = f"a {device.type} has no kernel for packed sequences"
            elif "attn_implementation" in own:
                why = "target.options.attn_implementation is what was asked for"
        return cls(model, info, head, target.batch_tokens, compile=compiles, padded=why)

    @cached_property
    def why_padded(self) -> str:
        """Why captures are padded; nothing where they are packed.

        Found out at the first look, by passes as long as any: who only writes answers, or decodes
        with drafts, has no use for it.
        """
        if self._padded is not None:
            return self._padded
        return why_padded(self.model, self.info, self._batch_tokens)

    @cached_property
    def _packed(self) -> PackedRuns | None:
        return None if self.why_padded else PackedRuns(self.model)

    def supports(self, spec: CaptureSpec) -> bool:
        """Say yes: what the target cannot give is an error that names it."""
        return True

    @torch.no_grad()  # not inference_mode: a draft trains on these tensors
    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Yield one capture per prompt, batched by length: not in the prompts' order.

        Raises CaptureError for token ids the target lacks and for non-finite states.
        """
        for batch in self._batches([len(prompt.input_ids) for prompt in prompts]):
            yield from self._run([prompts[i] for i in batch], spec)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        longer = [i for i, length in enumerate(lengths) if 0 < self._turn < length]
        longer.sort(key=lambda i: lengths[i])  # transformers lets a dynamic rope only grow
        others = [i for i, length in enumerate(lengths) if not 0 < self._turn < length]
        found = [lengths[i] for i in others]
        if self._packed is not None:
            batches = fill_in_order(found, self._batch_tokens)
        else:
            batches = group_by_length(found, self._batch_tokens, self._least)
        return [*([i] for i in longer), *([others[i] for i in batch] for batch in batches)]

    def _forward(self, ids: Sequence[Tensor]) -> None:
        """Run the decoder on sequences [T_i] at once."""
        if self._packed is not None:
            self._packed(ids)
            return
        # padding on the right needs no attention mask: no token sees a later one
        padded = pad_sequence(list(ids), batch_first=True).to(self.model.device)
        self._decoder(input_ids=padded, use_cache=False)

    def _run(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> list[TargetCapture]:
        check_prompts(prompts, self.info.vocab_size)
        with swapped(self._compiled), tap_states(self.model, spec, stop=True) as taps:
            self._forward([prompt.input_ids for prompt in prompts])
        states = {i: self._split(taps.hidden_states[i], prompts) for i in spec.layers}
        final = None if taps.final is None else self._split(taps.final, prompts)
        tokens, sums = self._through_head(spec, taps, prompts)
        captures = [
            TargetCapture(
                index=prompt.index,
                input_ids=prompt.input_ids,
                loss_mask=prompt.loss_mask,
                hidden_states={i: states[i][row] for i in spec.layers},
                final=None if final is None else final[row],
                next_tokens=tokens[row],
                logsumexp=sums[row],
            )
            for row, prompt in enumerate(prompts)
        ]
        _check_finite(captures, taps)
        return captures

    def _split(self, states: Tensor, prompts: Sequence[Prompt]) -> Sequence[Tensor]:
        """Return the states [T_i, H] of every prompt, views of those of the batch."""
        lengths = [len(prompt.input_ids) for prompt in prompts]
        if self._packed is not None:
            return torch.split(states[0], lengths)
        return [states[row, :end] for row, end in enumerate(lengths)]

    def _through_head(
        self, spec: CaptureSpec, taps: Taps, prompts: Sequence[Prompt]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Return every prompt's next tokens and log-sum-exp, on the CPU, where they are wanted."""
        nothing = [None] * len(prompts)
        if not (spec.next_tokens or spec.logsumexp):
            return nothing, nothing
        assert taps.normed is not None
        lengths = [len(prompt.input_ids) for prompt in prompts]
        tokens, sums = self._head.summarize(torch.cat(list(self._split(taps.normed, prompts))))
        return (
            torch.split(tokens.cpu(), lengths) if spec.next_tokens else nothing,
            torch.split(sums.cpu(), lengths) if spec.logsumexp else nothing,
        )

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Answer every prompt, `batch_size` of like lengths at a time, the longest first.

        A prompt's draws depend on its index and the seed alone, not on its batch.  Answers end
        where the target's positions do.
        """
        check_prompts(prompts, self.info.vocab_size)
        groups: dict[tuple[int, bool, bool], list[Prompt]] = {}
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.input_ids)):
            length = len(prompt.input_ids)
            room = answer_room(self.info, length, options)
            # by the tokens there is room for, and on which side of a long rope's turn those are
            where = room, length > self._turn, length + room > self._turn
            groups.setdefault(where, []).append(prompt)
        for (room, longer, ends_longer), group in groups.items():
            bounded = replace(options, max_new_tokens=room)
            # an answer that may pass the turn would turn all others with it
            size = options.batch_size if longer == ends_longer else 1
            for start in range(0, len(group), size):
                yield from answer_batch(self.model, group[start : start + size], bounded)

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.model = self._decoder = self._head = self._packed = None  # type: ignore[assignment]
        self._compiled = []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_finite(captures: Sequence[TargetCapture], taps: Taps) -> None:
    """Raise CaptureError naming the first prompt whose states hold a NaN or infinity."""
    states = [*taps.hidden_states.values(), *([] if taps.final is None else [taps.final])]
    # one sum per tensor and one look at the device, since a sum of finite parts can only
    # overflow, never hide one; the exact check runs when it fails
    if bool(torch.stack([s.sum(dtype=torch.float32) for s in states]).isfinite().all()):
        return
    for capture in captures:
        named = {f"layer {i}": s for i, s in capture.hidden_states.items()}
        if capture.final is not None:
            named["the final state"] = capture.final
        for name, state in named.items():
            if bad := int((~state.isfinite()).any(-1).sum()):
                raise CaptureError(
                    f"prompt {capture.index}: {name} is not finite at {bad} of {len(state)} tokens "
                    f"({state.dtype}). {finite_advice(state.dtype)}"
                )
