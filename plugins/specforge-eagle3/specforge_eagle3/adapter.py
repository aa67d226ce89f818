"""What is captured from the target, and what one stored sample holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from specforge_core.batches.collate import token_fields, truncate
from specforge_core.types import CaptureSpec, Field, Problem, Sample, TargetCapture, TargetInfo

from .config import VocabularyOptions, shape_fields

VERSION = 2


def capture_spec(layers: tuple[int, ...], hidden_size: int) -> CaptureSpec:
    """Return what one sample looks like.

    target_argmax holds the target's own next token at each position, and target_logsumexp the
    sum that its probabilities are divided by, so that training needs the target's head only for
    the draft vocabulary.
    """
    fields = {
        "input_ids": Field(shape=(None,), dtype="int64"),
        "loss_mask": Field(shape=(None,), dtype="uint8"),
        "hidden_states": Field(shape=(None, len(layers) * hidden_size), dtype="bfloat16"),
        "final": Field(shape=(None, hidden_size), dtype="bfloat16"),
        "target_argmax": Field(shape=(None,), dtype="int64"),
        "target_logsumexp": Field(shape=(None,), dtype="float32"),
    }
    return CaptureSpec(
        layers=layers,
        final="post_norm",
        fields=fields,
        next_tokens=True,
        logsumexp=True,
        version=VERSION,
    )


@dataclass(frozen=True, slots=True)
class Eagle3Adapter:
    """Stores the captured layers side by side, the final state and what the target makes of it."""

    spec: CaptureSpec
    mask_on: str

    @classmethod
    def build(cls, config: VocabularyOptions, target: TargetInfo) -> Eagle3Adapter:
        layers = shape_fields(config, target)["capture_layers"]  # refuses what cannot be trained
        return cls(capture_spec(layers, target.hidden_size), config.mask_on)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        if not trained_labels(capture.loss_mask, self.mask_on).any():
            return None
        assert capture.final is not None
        assert capture.next_tokens is not None
        assert capture.logsumexp is not None
        states = [capture.hidden_states[layer] for layer in self.spec.layers]
        return {
            "input_ids": capture.input_ids,
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden_states": torch.cat([s.to(torch.bfloat16) for s in states], dim=-1),
            "final": capture.final.to(torch.bfloat16),
            "target_argmax": capture.next_tokens,
            "target_logsumexp": capture.logsumexp,
        }


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
    """Cuts a sample to `max_length` tokens, and drops it if no label is left.

    EAGLE-3 draws nothing; for another method `draw` returns fields to add, by the labels [T] bool.
    """

    spec: CaptureSpec
    max_length: int
    mask_on: str
    draw: Callable[[Tensor, Generator], Sample] | None = None

    def __call__(self, sample: Sample, generator: Generator, /) -> Sample | None:
        cut = truncate(sample, token_fields(self.spec), self.max_length)
        labels = trained_labels(cut["loss_mask"], self.mask_on)
        if not labels.any():
            return None
        return cut if self.draw is None else cut | self.draw(labels, generator)


def check_choices(sample: Sample, vocab_size: int) -> list[Problem]:
    """Report choices of the target that are no tokens of it."""
    choices = sample.get("target_argmax")
    if choices is None or not choices.numel():
        return []  # the core reports a missing field
    low, high = int(choices.min()), int(choices.max())
    if low >= 0 and high < vocab_size:
        return []
    text = f"has values {low} to {high}, allowed are 0 to {vocab_size - 1}. Capture again"
    return [Problem(where="field 'target_argmax'", message=text)]
