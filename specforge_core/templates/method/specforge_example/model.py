"""What is trained, and the target's head, which is not.  H hidden size, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.nn.decoder import init_weights
from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.target.head import Head
from specforge_core.types import TargetInfo


class Blocks(nn.Module):
    """One residual block for each drafted token, all over the same state."""

    def __init__(self, hidden_size: int, draft_tokens: int, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(draft_tokens)
        )
        init_weights(self, std=0.02, seed=seed)

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., K, H], what the head reads for each of K tokens, of states [..., H]."""
        return torch.stack([states + F.silu(block(states)) for block in self.blocks], dim=-2)


class FrozenHead(nn.Module):
    """The target's head: on the batch's device, in the compute dtype, never saved."""

    weight: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.register_buffer("weight", head.weight)  # [V, H]
        self.scale, self.softcap = head.scale, head.softcap

    @classmethod
    def load(cls, target: TargetInfo) -> FrozenHead:
        """Read the head from the target's files."""
        return cls(Head.load(target))

    def forward(self, states: Tensor) -> Tensor:
        """Return logits [..., V] float32 of states [..., H]."""
        head = Head(weight=self.weight, scale=self.scale, softcap=self.softcap)
        return head.logits(states)

    def losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's cross-entropy and best token of states [N, H] and labels [N].

        The logits of all rows are never in memory together.
        """
        return linear_cross_entropy(states * self.scale, self.weight, labels, softcap=self.softcap)
