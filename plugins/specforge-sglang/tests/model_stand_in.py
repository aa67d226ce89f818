"""A model as SGLang has one: its layers hand on a residual, and a setter says which are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, LAYERS = 4, 3


class LogitsProcessor(nn.Module):
    """Takes what SGLang's takes."""

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        lm_head: Any,
        logits_metadata: Any,
        aux_hidden_states: Any = None,
    ) -> Tensor:
        return hidden_states

    def _get_logits(self, hidden_states: Tensor, lm_head: Any, metadata: Any) -> Tensor:
        assert metadata.next_token_logits_buffer is None
        self.rows = [*getattr(self, "rows", []), len(hidden_states)]
        return hidden_states @ torch.eye(HIDDEN, 7).roll(2, 1)


class Layer(nn.Module):
    """Adds 1, half of it to the residual, as SGLang's layers leave it to the next norm."""

    def forward(
        self, positions: Any, hidden_states: Tensor, batch: Any, residual: Tensor | None
    ) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, torch.zeros_like(hidden_states)
        residual += hidden_states  # in place, as fused kernels do
        return torch.ones_like(hidden_states), residual


class Norm(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        residual += hidden_states
        return residual * 10, residual


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        self.layers_to_capture: list[int] = []
        self.forgets = False  # the residual, as Gemma 3 does in SGLang 0.5.23

    def forward(self, ids: Tensor, batch: Any) -> Any:
        hidden, residual, kept = ids[:, None].float().repeat(1, HIDDEN), None, []
        for i, layer in enumerate(self.layers):
            if i in self.layers_to_capture:
                kept.append(hidden if self.forgets else hidden + residual)
            hidden, residual = layer(None, hidden, batch, residual)
        return self.norm(hidden, residual)[0], kept


class NoSetter(nn.Module):
    packs = False

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.logits_processor = LogitsProcessor()

    def forward(self, ids: Tensor, batch: Any) -> Any:
        hidden, kept = self.model(ids, batch)
        aux = torch.cat(kept, -1) if kept and self.packs else kept or None
        return self.logits_processor(ids, hidden, None, batch, aux)


class Model(NoSetter):
    def set_eagle3_layers_to_capture(self, layers: list[int]) -> None:
        self.model.layers_to_capture = [layer + 1 for layer in layers]
