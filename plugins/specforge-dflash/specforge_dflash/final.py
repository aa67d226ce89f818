"""The final state that the target's head reads, beside what DFlash captures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specforge_core.target.measure import HeadScale
from specforge_core.types import CaptureSpec, Field, Sample, TargetCapture, TargetInfo

from .adapter import DFlashAdapter
from .config import DFlashConfig
from .model import Frozen


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


class Target(Frozen):
    """The target's embedding and head, also to say what the target makes of a final state."""

    def __init__(self, frozen: Frozen, beside: HeadScale) -> None:
        super().__init__(frozen.embed_tokens, frozen.lm_head, frozen.scale, frozen.softcap)
        self.beside = beside

    def own_logits(self, products: Tensor) -> Tensor:
        """Return the target's logits for products of its head and final states."""
        out, cap = products * self.beside.scale, self.beside.softcap
        return out if cap is None else cap * torch.tanh(out / cap)
