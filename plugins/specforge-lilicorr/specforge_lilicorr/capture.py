"""What is captured: what DFlash captures, and the final state that the target's head reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from specforge_dflash.adapter import DFlashAdapter

from specforge_core.types import CaptureSpec, Field, Sample, TargetCapture, TargetInfo

from .config import LiLiCorrConfig

FINAL = "final"


def with_final(spec: CaptureSpec, hidden_size: int) -> CaptureSpec:
    """Return `spec` with the last layer's output behind the final norm."""
    final = Field(shape=(None, hidden_size), dtype="bfloat16")
    return replace(spec, final="post_norm", fields={**spec.fields, FINAL: final})


@dataclass(frozen=True, slots=True)
class LiLiCorrAdapter:
    """Stores the captured layers side by side, and the final state where the loss needs it."""

    spec: CaptureSpec
    layers: DFlashAdapter

    @classmethod
    def build(cls, config: LiLiCorrConfig, target: TargetInfo) -> LiLiCorrAdapter:
        layers = DFlashAdapter.build(config, target)
        if not config.penalty_weight:
            return cls(layers.spec, layers)
        return cls(with_final(layers.spec, target.hidden_size), layers)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        sample = self.layers(capture)
        if sample is None or FINAL not in self.spec.fields:
            return sample
        assert capture.final is not None
        return {**sample, FINAL: capture.final.to(torch.bfloat16)}
