"""What is captured from the target, and what one stored sample holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specforge_core.errors import DataError
from specforge_core.types import CaptureSpec, Field, Sample, TargetCapture, TargetInfo

from .anchors import start_places
from .config import DFlashConfig, draft_shape
from .mask_token import mask_token, mask_token_occurs

VERSION = 1


def capture_spec(layers: tuple[int, ...], hidden_size: int) -> CaptureSpec:
    """Return what one sample looks like: the layers' outputs side by side, in order."""
    fields = {
        "input_ids": Field(shape=(None,), dtype="int64"),
        "loss_mask": Field(shape=(None,), dtype="uint8"),
        "hidden_states": Field(shape=(None, len(layers) * hidden_size), dtype="bfloat16"),
    }
    return CaptureSpec(layers=layers, fields=fields, version=VERSION)


@dataclass(frozen=True, slots=True)
class DFlashAdapter:
    """Stores the captured layers side by side; skips samples no block can start in."""

    spec: CaptureSpec
    mask_token_id: int

    @classmethod
    def build(cls, config: DFlashConfig, target: TargetInfo) -> DFlashAdapter:
        mask = mask_token(config, target)
        layers = draft_shape(config, target, mask).capture_layers  # refuses what cannot be trained
        return cls(capture_spec(layers, target.hidden_size), mask)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        if not len(start_places(capture.loss_mask)):
            return None
        if bool((capture.input_ids == self.mask_token_id).any()):
            raise DataError(mask_token_occurs(self.mask_token_id, f"sample {capture.index}"))
        states = [capture.hidden_states[layer] for layer in self.spec.layers]
        return {
            "input_ids": capture.input_ids.long(),
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden_states": torch.cat([s.to(torch.bfloat16) for s in states], dim=-1),
        }
