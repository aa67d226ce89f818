"""What is captured from the target, and what one stored sample holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.defaults import truncate
from specforge_core.errors import DataError
from specforge_core.types import CaptureSpec, Field, Sample, TargetCapture, TargetInfo

from .config import DFlashConfig, capture_layers
from .mask_token import REMEDY, mask_token

VERSION = 1


def capture_spec(layers: tuple[int, ...], hidden_size: int) -> CaptureSpec:
    """Return what one sample looks like: the layers' outputs side by side, in order."""
    fields = {
        "input_ids": Field((None,), "int64"),
        "loss_mask": Field((None,), "uint8"),
        "hidden_states": Field((None, len(layers) * hidden_size), "bfloat16"),
    }
    return CaptureSpec(layers, "none", fields, VERSION)


@dataclass(frozen=True, slots=True)
class DFlashAdapter:
    """Stores the captured layers side by side; skips samples no block can start in."""

    spec: CaptureSpec
    mask_token_id: int

    @classmethod
    def build(cls, config: DFlashConfig, target: TargetInfo) -> DFlashAdapter:
        layers = capture_layers(config, target.num_layers)
        return cls(capture_spec(layers, target.hidden_size), mask_token(config, target))

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        if not trainable(capture.loss_mask):
            return None
        if bool((capture.input_ids == self.mask_token_id).any()):
            raise DataError(mask_token_occurs(self.mask_token_id, f"sample {capture.index}"))
        states = [capture.hidden_states[layer] for layer in self.spec.layers]
        return {
            "input_ids": capture.input_ids.long(),
            "loss_mask": capture.loss_mask.to(torch.uint8),
            "hidden_states": torch.cat([s.to(torch.bfloat16) for s in states], dim=-1),
        }


@dataclass(frozen=True, slots=True)
class DFlashTransform:
    """Cuts a sample to `max_length` tokens, and drops it if no block can start in the rest."""

    spec: CaptureSpec
    max_length: int

    def __call__(self, sample: Sample, /) -> Sample | None:
        cut = truncate(sample, spec=self.spec, max_length=self.max_length)
        return cut if trainable(cut["loss_mask"]) else None


def trainable(loss_mask: Tensor) -> bool:
    """Say whether two consecutive tokens are supervised, the least a block needs."""
    kept = loss_mask.bool()
    return bool((kept[:-1] & kept[1:]).any())


def mask_token_occurs(token: int, where: str) -> str:
    """Say that the mask token is not free to stand for unknown tokens."""
    return f"{where} contains token {token}, which the draft reads as 'not drafted yet'. {REMEDY}"
