"""The target in this process, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import TargetConfig
from ..cpu import pick_target_dtype
from ..errors import CaptureError, ConfigError
from ..types import CaptureSpec, Prompt, TargetCapture, TargetInfo
from .asked import check_prompts
from .batching import group_by_length
from .layout import finite_advice
from .taps import Taps, find_parts, tap_states


def load_target_info(target: TargetConfig) -> TargetInfo:
    """Read the target's config; no weights.

    Raises ConfigError when there is no such target, or it is no decoder-only model.
    """
    config = _load(AutoConfig, target)
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(
        text, "use_bidirectional_attention", None
    ) in (
        True,
        "all",
    ):
        raise ConfigError(
            f"target {target.path!r} ({config.model_type}) is not a causal decoder-only model: "
            "its states depend on later tokens. Choose another target.path"
        )
    as_dict = text.to_dict()
    # a multimodal config says outside of its text section whether the head is tied
    as_dict["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    try:
        sizes = (text.hidden_size, text.num_hidden_layers, text.vocab_size)
    except AttributeError as exc:
        raise ConfigError(
            f"target {target.path!r} ({config.model_type}) is no language model: {exc}. "
            "Choose another target.path"
        ) from exc
    revision = getattr(config, "_commit_hash", None) or target.revision
    return TargetInfo(target.path, revision, *sizes, config=as_dict)


def _load(auto: Any, target: TargetConfig, **kwargs: Any) -> Any:
    """Call `from_pretrained`, turning what users get wrong into a ConfigError."""
    path = Path(target.path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"target.path {target.path!r} has no config.json: it is not a saved model. "
            "Try: target.path=DIRECTORY_OF_A_MODEL"
        )
    try:
        return auto.from_pretrained(
            target.path,
            revision=target.revision,
            trust_remote_code=target.trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as exc:
        reason = str(exc).strip().splitlines()[0]
        revision = f" at revision {target.revision!r}" if target.revision else ""
        raise ConfigError(
            f"target.path {target.path!r}{revision} cannot be loaded: {reason}. "
            "Try: target.path=DIRECTORY or a Hugging Face id, and `hf auth login` if it is gated"
        ) from exc


class TransformersEngine:
    """A TargetEngine in this process.  Its captures are slices of one padded batch."""

    def __init__(self, model: Any, info: TargetInfo, batch_tokens: int) -> None:
        self.model = model
        self.info = info
        self._decoder: Any = find_parts(model).decoder
        self._batch_tokens = batch_tokens

    @classmethod
    def load(cls, target: TargetConfig) -> TransformersEngine:
        """Load the target's weights onto its device; ConfigError when that fails."""
        info = load_target_info(target)
        pinned = target.model_copy(update={"revision": info.revision})  # the branch may move on
        # evaluation runs the target here whatever engine captures: its options are not for this one
        own = target.options if target.engine == "transformers" else {}
        device = pick_device(target.device)
        dtype = pick_target_dtype(target.dtype, info.config.get("dtype"), device)
        options = {"dtype": dtype, "output_loading_info": True, **own}
        model, report = _load(AutoModelForCausalLM, pinned, **options)
        # transformers would go on with random weights
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"target.path {target.path!r} lacks {len(missing)} of its weights, such as "
                f"{missing[0]}. Download it again, or choose another target.path"
            )
        model.eval().requires_grad_(False)
        return cls(model.to(device), info, target.batch_tokens)

    @torch.no_grad()  # not inference_mode: a draft trains on these tensors
    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Yield one capture per prompt, batched by length: not in the prompts' order.

        Raises CaptureError for token ids the target lacks and for non-finite states.
        """
        for batch in group_by_length([len(p.input_ids) for p in prompts], self._batch_tokens):
            yield from self._run([prompts[i] for i in batch], spec)

    def _run(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> list[TargetCapture]:
        check_prompts(prompts, self.info.vocab_size)
        device = self.model.device
        # padding on the right needs no attention mask: no token sees a later one
        ids = pad_sequence([p.input_ids for p in prompts], batch_first=True).to(device)
        masks = pad_sequence([p.loss_mask for p in prompts], batch_first=True).to(device)
        with tap_states(self.model, spec, stop=True) as taps:
            self._decoder(input_ids=ids, use_cache=False)
        captures = []
        for row, prompt in enumerate(prompts):
            end = len(prompt.input_ids)
            states = {layer: taps.hidden_states[layer][row, :end] for layer in spec.layers}
            final = None if taps.final is None else taps.final[row, :end]
            captures.append(
                TargetCapture(prompt.index, ids[row, :end], masks[row, :end], states, final)
            )
        _check_finite(captures, taps)
        return captures

    def close(self) -> None:
        """Drop the model, so that its memory can be used again."""
        self.model = self._decoder = None
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


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is this rank's GPU, or the CPU."""
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise ConfigError(
            f"target.device {name!r} cannot be used: {reason}. Try: target.device=auto"
        ) from exc
    return device
