"""The final state that the target's head reads, beside what DFlash captures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from specforge_core.types import CaptureSpec, Field, Sample, TargetCapture, TargetInfo

from .adapter import DFlashAdapter
from .config import DFlashConfig


def with_final(spec: CaptureSpec, hidden_size: int) -> CaptureSpec:
    """Return `spec` with the last layer's output behind the final norm."""
    final = Field(shape=(None, hidden_size), dtype="bfloat16")
    return replace(spec, final="post_norm", fields={**spec.fields, "final": final})


@dataclass(frozen=True, slots=True)
class FinalAdapter:
    """Stores the captured layers side by side, and the final state."""

    spec: CaptureSpec
    layers: DFlashAdapter

    @classmethod
    def build(cls, config: DFlashConfig, target: TargetInfo) -> FinalAdapter:
        layers = DFlashAdapter.build(config, target)
        return cls(with_final(layers.spec, target.hidden_size), layers)

    def __call__(self, capture: TargetCapture, /) -> Sample | None:
        sample = self.layers(capture)
        if sample is None:
            return None
        assert capture.final is not None
        return {**sample, "final": capture.final.to(torch.bfloat16)}
