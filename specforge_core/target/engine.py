"""The target in this process, through transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from ..config import TargetConfig
from ..cpu import pick_target_dtype
from ..errors import CaptureError, ConfigError
from ..progress import console
from ..types import CaptureSpec, Generated, GenerateOptions, Prompt, TargetCapture, TargetInfo
from .asked import answer_room, check_prompts, finite_advice
from .batching import group_by_length
from .generate import answer_batch
from .head import Head
from .info import load_pretrained, load_target_info
from .proof import prove
from .quantised import PLAIN, as_plain, check_method, loading, quant_method, widen_weights
from .skeleton import auto_class, find_parts, text_model
from .taps import Taps, tap_states
from .weights import NoSafetensors, tensor_dtypes

# Arguments of from_pretrained that `target` has keys for, or that are decided here
RESERVED = frozenset(
    ("auto", "target", "pretrained_model_name_or_path", "revision", "trust_remote_code", "dtype")
) | {"torch_dtype", "output_loading_info", "ignore_mismatched_sizes"}


class TransformersEngine:
    """A TargetEngine in this process.  Its captures are slices of one padded batch."""

    def __init__(self, model: Any, info: TargetInfo, head: Head, batch_tokens: int) -> None:
        self.model = model
        self.info = info
        self._decoder: Any = find_parts(model).decoder
        self._head = head
        self._batch_tokens = batch_tokens

    @classmethod
    def load(cls, target: TargetConfig, device: torch.device) -> TransformersEngine:
        """Load the target's weights onto a device; ConfigError when that fails."""
        info = load_target_info(target)
        pinned = target.model_copy(update={"revision": info.revision})  # the branch may move on
        # evaluation runs the target here whatever engine captures: its options are not for this one
        own = target.options if target.engine == "transformers" else {}
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
        stored = _stored(info)  # before transformers follows what an index says
        with loading(method, target.path):
            options |= as_plain(method)
            model, report = load_pretrained(auto_class(config), pinned, **options | own)
        _check_loaded(model, report, info, stored, method)
        model = text_model(model)
        with loading(method, target.path):
            model.eval().requires_grad_(False)
            if method in PLAIN and dtype != "auto":
                widen_weights(model, getattr(torch, dtype))
            model.to(device)
            head = prove(model, info)
        return cls(model, info, head, target.batch_tokens)

    def supports(self, spec: CaptureSpec) -> bool:
        """Say yes: what the target cannot give is an error that names it."""
        return True

    @torch.no_grad()  # not inference_mode: a draft trains on these tensors
    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Yield one capture per prompt, batched by length: not in the prompts' order.

        Raises CaptureError for token ids the target lacks and for non-finite states.
        """
        for batch in group_by_length([len(p.input_ids) for p in prompts], self._batch_tokens):
            yield from self._run([prompts[i] for i in batch], spec)

    def _run(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> list[TargetCapture]:
        check_prompts(prompts, self.info.vocab_size)
        # padding on the right needs no attention mask: no token sees a later one
        ids = pad_sequence([p.input_ids for p in prompts], batch_first=True)
        with tap_states(self.model, spec, stop=True) as taps:
            self._decoder(input_ids=ids.to(self.model.device), use_cache=False)
        tokens, sums = self._through_head(spec, taps, prompts)
        captures = []
        for row, prompt in enumerate(prompts):
            end = len(prompt.input_ids)
            captures.append(
                TargetCapture(
                    index=prompt.index,
                    input_ids=prompt.input_ids,
                    loss_mask=prompt.loss_mask,
                    hidden_states={i: taps.hidden_states[i][row, :end] for i in spec.layers},
                    final=None if taps.final is None else taps.final[row, :end],
                    next_tokens=tokens[row],
                    logsumexp=sums[row],
                )
            )
        _check_finite(captures, taps)
        return captures

    def _through_head(
        self, spec: CaptureSpec, taps: Taps, prompts: Sequence[Prompt]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Return every prompt's next tokens and log-sum-exp, on the CPU, where they are wanted."""
        nothing = [None] * len(prompts)
        if not (spec.next_tokens or spec.logsumexp):
            return nothing, nothing
        assert taps.normed is not None
        lengths = [len(prompt.input_ids) for prompt in prompts]
        rows = [taps.normed[row, :end] for row, end in enumerate(lengths)]
        tokens, sums = self._head.summarize(torch.cat(rows))
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
        groups: dict[int, list[Prompt]] = {}  # by the tokens there is room for
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.input_ids)):
            room = answer_room(self.info, len(prompt.input_ids), options)
            groups.setdefault(room, []).append(prompt)
        for room, group in groups.items():
            bounded = replace(options, max_new_tokens=room)
            for start in range(0, len(group), options.batch_size):
                chosen = group[start : start + options.batch_size]
                yield from answer_batch(self.model, chosen, bounded)

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.model = self._decoder = self._head = None  # type: ignore[assignment]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stored(info: TargetInfo) -> Mapping[str, str]:
    """Return each tensor's dtype code in the target's files; nothing for those of another format.

    Raises CaptureError for files that are damaged, or an index that leads elsewhere.
    """
    try:
        return tensor_dtypes(info)
    except NoSafetensors:
        return {}


def _check_loaded(
    model: Any,
    report: Mapping[str, Any],
    info: TargetInfo,
    stored: Mapping[str, str],
    method: str | None,
) -> None:
    """Raise ConfigError for weights that are not in the files, or beside used ones and not used.

    transformers would go on: with random weights for the former; without, say, the scales of
    8-bit weights for the latter.  Whole modules that a text model has no use for are no error.
    """
    path = info.name_or_path
    _check_shapes(path, report["mismatched_keys"], method, info.vocab_size)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"target.path {path!r} lacks {len(missing)} of its weights, such as {missing[0]}. "
            "Download it again, or choose another target.path"
        )
    tied = info.config.get("tie_word_embeddings")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if tied and head is not None and head.weight is not embedding.weight:
        console.print(
            f"note: config.json of {path} says tie_word_embeddings, and its files have a head of "
            "their own, which is used here. A serving engine may take the embedding for it: set "
            "tie_word_embeddings to false in config.json"
        )
    own = model.state_dict()
    _check_layers(path, own.keys(), report["unexpected_keys"], len(find_parts(model).layers))
    if method is None:
        for name, code in stored.items():
            if (
                name in own
                and own[name].is_floating_point()
                and code[0] in "IUB"
                and code != "BF16"
            ):
                raise ConfigError(
                    f"target.path {path!r} has {name} in whole numbers ({code}) and no "
                    "quantization_config in its config.json that says what they stand for. "
                    "Try: target.path= its unquantised checkpoint"
                )
    unused = set(report["unexpected_keys"])
    used = (stored.keys() | own.keys()) - unused
    modules = {name.rpartition(".")[0] for name in used}
    if beside := sorted(n for n in unused if n.rpartition(".")[0] in modules or _inside(n, used)):
        why = (
            "If it is quantised, its config.json lacks the quantization_config that transformers "
            "reads; if they are of an adapter, merge it into the weights"
            if method is None
            else f"It is quantised ({method}), in another layout than transformers reads"
        )
        raise ConfigError(
            f"target.path {path!r} has {len(beside)} tensors that {type(model).__name__} does not "
            f"use beside others that it does, such as {beside[0]}: its states would be wrong. "
            f"{why}. Try: target.path= its unquantised checkpoint"
        )


def _check_layers(path: str, own: Collection[str], unused: Iterable[str], used: int) -> None:
    """Raise ConfigError for layers in the files, like those that run, that the config leaves out.

    Layers that predict further tokens stand behind the others, too, and have parts of their own.
    """
    behind: dict[str, set[str]] = {}  # of each layer beyond the last
    for name in unused:
        if (found := re.match(r"(.*?\.)(\d+)\.(.+)", name)) and int(found[2]) >= used:
            behind.setdefault(f"{found[1]}{found[2]}.", set()).add(found[3])
    for prefix, names in behind.items():
        last = re.sub(r"\d+\.$", f"{used - 1}.", prefix)
        if names == {name.removeprefix(last) for name in own if name.startswith(last)}:
            raise ConfigError(
                f"target.path {path!r} has weights of more layers ({prefix[:-1]}) than the {used} "
                "that num_hidden_layers in its config.json says, and like them: its states would "
                "be wrong. Correct it, or choose another target.path"
            )


def _inside(name: str, used: Collection[str]) -> bool:
    """Say whether a tensor is part of a module that has a weight of its own, as an adapter's is."""
    parts = name.split(".")
    return any(".".join((*parts[:end], "weight")) in used for end in range(1, len(parts) - 1))


def _check_shapes(
    path: str, mismatched: Iterable[tuple[str, Any, Any]], method: str | None, vocab_size: int
) -> None:
    """Raise ConfigError for a tensor of another shape than the config says: it is not loaded."""
    if not (wrong := sorted(mismatched)):
        return
    name, found, expected = wrong[0]
    if not method and found[1:] == expected[1:] and expected[0] == vocab_size:
        raise ConfigError(
            f"target.path {path!r} has {name} of {found[0]} rows, where the vocab_size in its "
            f"config.json is {vocab_size}. Correct the one or the other"
        )
    what = f"quantised ({method})" if method else "packed into fewer bits, or of another model"
    raise ConfigError(
        f"target.path {path!r} has {name} of shape {list(found)}, where its config.json needs "
        f"{list(expected)}; {len(wrong)} of its tensors do not fit. They are {what}, in a layout "
        "that transformers does not read. Try: target.path= its unquantised checkpoint"
    )


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
