"""What is captured from the target, and what one stored sample holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge_core.target.weights import load_target_tensors
from specforge_core.defaults import truncate
from specforge_core.types import (
    Batch,
    CaptureSpec,
    Field,
    Problem,
    Sample,
    TargetCapture,
    TargetInfo,
)

from .config import Eagle3Config, capture_layers

VERSION = 1
ARGMAX_ROWS = 512  # rows whose full-vocabulary logits exist at a time
DOCUMENTS = "document_ids"  # [B, S]: 1, 2, ... on the samples of a row, 0 on padding


def capture_spec(layers: tuple[int, ...], hidden_size: int) -> CaptureSpec:
    """Return what one sample looks like.

    target_argmax holds the target's own next token at each position, so that training needs
    the target's head only for the draft vocabulary.
    """
    fields = {
        "input_ids": Field((None,), "int64"),
        "loss_mask": Field((None,), "uint8"),
        "hidden_states": Field((None, len(layers) * hidden_size), "bfloat16"),
        "final": Field((None, hidden_size), "bfloat16"),
        "target_argmax": Field((None,), "int64"),
    }
    return CaptureSpec(layers, "post_norm", fields, VERSION)


@dataclass(slots=True)
class Eagle3Adapter:
    """Stores the captured layers side by side, the final state and the target's choices."""

    spec: CaptureSpec
    target: TargetInfo
    mask_on: str
    _head: Tensor | None = field(default=None, repr=False)  # [V, H]; read when first needed

    @classmethod
    def build(cls, config: Eagle3Config, target: TargetInfo) -> Eagle3Adapter:
        layers = capture_layers(config, target.num_layers)
        return cls(capture_spec(layers, target.hidden_size), target, config.mask_on)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        if not trained_labels(capture.loss_mask, self.mask_on).any():
            return None
        assert capture.final is not None
        states = [capture.hidden_states[layer] for layer in self.spec.layers]
        return {
            "input_ids": capture.input_ids.long(),
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden_states": torch.cat([s.to(torch.bfloat16) for s in states], dim=-1),
            "final": capture.final.to(torch.bfloat16),
            "target_argmax": self._choices(capture.final),
        }

    @torch.no_grad()
    def _choices(self, final: Tensor) -> Tensor:
        """Return the target's most likely next token [T] of final states [T, H]."""
        if self._head is None or self._head.device != final.device:
            head = load_target_tensors(self.target, ("lm_head",))["lm_head"]
            self._head = head[: self.target.vocab_size].to(final.device, final.dtype)  # no padding
        parts = [(rows @ self._head.t()).argmax(dim=-1) for rows in torch.split(final, ARGMAX_ROWS)]
        return torch.cat(parts)


def trained_labels(loss_mask: Tensor, mask_on: str, documents: Tensor | None = None) -> Tensor:
    """Say at which positions u [T] the target's distribution is a label.

    Row t of step i reads the feature of token t and the token t+1+i, and its label is the
    distribution of the token after u = t+1+i.  `mask_on` says which token has to be
    supervised: the one that distribution is of (label, u+1), the one just read (input, u),
    or the one before it (feature, u-1: at step 0 the feature's own).  With `documents` [T],
    t, u and that token are of the same one.
    """
    kept = loss_mask.bool()
    out = torch.zeros_like(kept)
    inner: Tensor | bool = True if documents is None else documents[1:] == documents[:-1]
    if mask_on == "label":
        out[:-1] = kept[1:] & inner
    elif mask_on == "input":
        out[:] = kept
    else:
        out[1:] = kept[:-1]
    out[1:] &= inner
    out[:1] = False  # no row is before the first token
    return out


@dataclass(frozen=True, slots=True)
class Eagle3Transform:
    """Cuts a sample to `max_length` tokens, and drops it if no label is left."""

    spec: CaptureSpec
    max_length: int
    mask_on: str

    def __call__(self, sample: Sample, /) -> Sample | None:
        cut = truncate(sample, spec=self.spec, max_length=self.max_length)
        return cut if trained_labels(cut["loss_mask"], self.mask_on).any() else None


def pack(samples: Sequence[Sample]) -> Batch:
    """Put samples behind each other in one row [1, sum of T]."""
    batch = {name: torch.cat([s[name] for s in samples])[None] for name in samples[0]}
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    numbers = torch.arange(1, len(samples) + 1)
    documents = numbers.repeat_interleave(lengths)[None]
    return batch | {DOCUMENTS: documents.to(batch["input_ids"].device)}


def pad(samples: Sequence[Sample]) -> Batch:
    """Put one sample in each row [B, longest]; padding is zero and in no document."""
    with_ids = [{**s, DOCUMENTS: torch.ones_like(s["input_ids"])} for s in samples]
    return {
        name: pad_sequence([s[name] for s in with_ids], batch_first=True) for name in with_ids[0]
    }


def check_choices(sample: Sample, vocab_size: int) -> list[Problem]:
    """Report choices of the target that are no tokens of it."""
    choices = sample.get("target_argmax")
    if choices is None or not choices.numel():
        return []  # the core reports a missing field
    low, high = int(choices.min()), int(choices.max())
    if low >= 0 and high < vocab_size:
        return []
    text = f"has values {low} to {high}, allowed are 0 to {vocab_size - 1}. Capture again"
    return [Problem("field 'target_argmax'", text)]
