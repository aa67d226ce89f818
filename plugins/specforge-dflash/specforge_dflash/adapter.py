"""What is captured from the target, and what one stored sample holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from specforge_core.errors import DataError
from specforge_core.types import CaptureSpec, Field, Problem, Sample, TargetCapture, TargetInfo

from .anchors import start_places
from .config import DFlashConfig, draft_shape, objective
from .mask_token import mask_token, mask_token_occurs

VERSION = 1
CHOICES = "target_argmax"  # the target's own next token at each position


def capture_spec(layers: tuple[int, ...], hidden_size: int) -> CaptureSpec:
    """Return what one sample looks like: the layers' outputs side by side, in order."""
    fields = {
        "input_ids": Field(shape=(None,), dtype="int64"),
        "loss_mask": Field(shape=(None,), dtype="uint8"),
        "hidden_states": Field(shape=(None, len(layers) * hidden_size), dtype="bfloat16"),
    }
    return CaptureSpec(layers=layers, fields=fields, version=VERSION)


def with_choices(spec: CaptureSpec) -> CaptureSpec:
    """Return `spec` with the target's own next tokens."""
    choices = Field(shape=(None,), dtype="int64")
    return replace(spec, next_tokens=True, fields={**spec.fields, CHOICES: choices})


def with_final(spec: CaptureSpec, hidden_size: int) -> CaptureSpec:
    """Return `spec` with the last layer's output behind the final norm."""
    final = Field(shape=(None, hidden_size), dtype="bfloat16")
    return replace(spec, final="post_norm", fields={**spec.fields, "final": final})


def check_choices(sample: Sample, vocab_size: int) -> list[Problem]:
    """Report choices of the target that are no tokens of it."""
    choices = sample.get(CHOICES)
    if choices is None or bool(((choices >= 0) & (choices < vocab_size)).all()):
        return []
    text = f"has values beyond the target's {vocab_size} tokens. Capture again"
    return [Problem(where=f"field {CHOICES!r}", message=text)]


@dataclass(frozen=True, slots=True)
class DFlashAdapter:
    """Stores the captured layers side by side, and what is asked for besides.

    Skips samples no block can start in.
    """

    spec: CaptureSpec
    mask_token_id: int
    given: int | None  # that id, where it was not chosen

    @classmethod
    def build(cls, config: DFlashConfig, target: TargetInfo) -> DFlashAdapter:
        mask = mask_token(config.mask_token_id, target)
        layers = draft_shape(config, target, mask).capture_layers  # refuses what cannot be trained
        spec = capture_spec(layers, target.hidden_size)
        if objective(config).labels == "target":
            spec = with_choices(spec)
        if config.reads_final:
            spec = with_final(spec, target.hidden_size)
        return cls(spec, mask, config.mask_token_id)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        if not len(start_places(capture.loss_mask)):
            return None
        if bool((capture.input_ids == self.mask_token_id).any()):
            where = f"sample {capture.index}"
            raise DataError(mask_token_occurs(self.mask_token_id, self.given, where))
        states = [capture.hidden_states[layer] for layer in self.spec.layers]
        sample = {
            "input_ids": capture.input_ids.long(),
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden_states": torch.cat([s.to(torch.bfloat16) for s in states], dim=-1),
        }
        if CHOICES in self.spec.fields:
            assert capture.next_tokens is not None
            sample[CHOICES] = capture.next_tokens
        if "final" in self.spec.fields:
            assert capture.final is not None
            sample["final"] = capture.final.to(torch.bfloat16)
        return sample
