"""What DSpark adds to a DFlash backbone: the Markov head and the confidence head.

Parameter names are those of the published checkpoints.  Shapes: M blocks, D slots of a block
that draft, H hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import MarkovKind


class MarkovHead(nn.Module):
    """Corrects a slot's logits by the token before it: bias = W2 latent.

    With e = W1[token before] and h the slot's state:
        vanilla  latent = e
        gated    latent = sigmoid(G [h; e]) * e
        rnn      [g, c, o] = J [s; e; h],  latent = tanh(o),
                 s <- sigmoid(g) s + (1 - sigmoid(g)) tanh(c), 0 at a block's first slot
    """

    def __init__(self, kind: MarkovKind, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Return latents [M, D, r] for embeddings [M, D, r] of the tokens before the slots."""
        if self.kind != "rnn":
            return self.step(embeddings, hidden)[0]
        state, out = None, []
        for e, h in zip(embeddings.unbind(1), hidden.unbind(1), strict=True):
            latent, state = self.step(e, h, state)
            out.append(latent)
        return torch.stack(out, dim=1)

    def step(
        self, embeddings: Tensor, hidden: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return one slot's latents [..., r] and the state [..., r] behind it, None at first."""
        if self.kind == "vanilla":
            return embeddings, state
        if self.kind == "gated":
            gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embeddings], dim=-1)))
            return gate * embeddings, state
        state = torch.zeros_like(embeddings) if state is None else state
        parts = self.joint_proj(torch.cat([state, embeddings, hidden], dim=-1))
        keep, candidate, out = parts.chunk(3, dim=-1)
        keep = torch.sigmoid(keep)
        return torch.tanh(out), keep * state + (1 - keep) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """Predicts, before a slot's token is drawn, how likely the token will be accepted."""

    def __init__(self, hidden_size: int, rank: int, *, with_markov: bool) -> None:
        super().__init__()
        self.with_markov = with_markov
        self.proj = nn.Linear(hidden_size + (rank if with_markov else 0), 1)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Return logits [...] for states [..., H] and embeddings [..., r] of the tokens before."""
        features = torch.cat([hidden, embeddings], dim=-1) if self.with_markov else hidden
        out: Tensor = self.proj(features.to(self.proj.weight.dtype)).squeeze(-1)
        return out
