"""The DSpark draft: a DFlash backbone with a Markov head and a confidence head.

Names of the heads' parameters are those of the published checkpoints.  Shapes: M blocks, D slots
of a block that draft, R slots that are trained, H hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from specforge_dflash.around import slot_states
from specforge_dflash.config import DraftShape
from specforge_dflash.model import DFlashModel, Frozen
from specforge_dflash.step import drafting_rows, teachers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specforge_core.nn.soft_loss import wide
from specforge_core.types import Batch

from .config import DSparkConfig


class MarkovHead(nn.Module):
    """Corrects a slot's logits by the token before it: bias = W2 latent.

    With e = W1[token before] and h the slot's state:
        vanilla  latent = e
        gated    latent = sigmoid(G [h; e]) * e
        rnn      [g, c, o] = J [s; e; h],  latent = tanh(o),
                 s <- sigmoid(g) s + (1 - sigmoid(g)) tanh(c), 0 at a block's first slot
    """

    def __init__(self, config: DSparkConfig, shape: DraftShape) -> None:
        super().__init__()
        self.kind, rank = config.markov_head, config.markov_rank
        self.markov_w1 = nn.Embedding(shape.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, shape.vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(shape.hidden_size + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + shape.hidden_size, 3 * rank)

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

    def __init__(self, config: DSparkConfig, shape: DraftShape) -> None:
        super().__init__()
        self.with_markov = config.confidence_with_markov
        self.proj = nn.Linear(shape.hidden_size + self.with_markov * config.markov_rank, 1)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Return logits [...] for states [..., H] and embeddings [..., r] of the tokens before."""
        features = torch.cat([hidden, embeddings], dim=-1) if self.with_markov else hidden
        out: Tensor = self.proj(features.to(self.proj.weight.dtype)).squeeze(-1)
        return out


class DSparkModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, backbone: DFlashModel, config: DSparkConfig) -> None:
        super().__init__()
        self.config, shape = config, backbone.shape
        with torch.device("meta"):
            self.markov_head = MarkovHead(config, shape)
            self.confidence_head = ConfidenceHead(config, shape) if config.confidence_head else None
        self.to_empty(device=backbone.fc.weight.device)
        draws = torch.Generator().manual_seed(config.seed)  # alike on every rank
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=shape.init_std, generator=draws)
        self.backbone = backbone

    def forward(self, batch: Batch, frozen: Frozen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compare every trained slot with its label and with the target's distribution.

        Return of each [R] its cross-entropy, the sum over the vocabulary of |p - q|, whether the
        likeliest token is the label, and its confidence: a logit, 0 without a confidence head.
        The token before a slot is the data's own, which a served draft has too as long as
        all it drafted before was right.
        """
        hidden = slot_states(self.backbone, frozen, batch)
        block, first = self.config.block_size, self.config.first_slot
        hidden = hidden.reshape(-1, block, hidden.shape[-1])[:, first:]
        labels = batch["labels"].flatten(0, 1)[:, first:]
        known = batch["block_ids"].flatten(0, 1)[:, :1]
        embeddings = self.markov_head.markov_w1(torch.cat([known, labels[:, :-1]], dim=1))
        latents = self.markov_head(embeddings, hidden)
        rows = drafting_rows(self.config, batch)
        hidden, labels, embeddings, latents = (
            x.flatten(0, 1)[rows] for x in (hidden, labels, embeddings, latents)
        )
        finals = batch["final"].flatten(0, 1)[teachers(self.config, batch).flatten()[rows]]
        w2 = self.markov_head.markov_w2.weight
        given = (x.split(self.config.head_chunk) for x in (hidden, latents, finals, labels))
        done = [
            # the logits of all rows would not fit: they are made again in the backward pass
            checkpoint(compare, *part, frozen, w2, use_reentrant=False, preserve_rng_state=False)
            for part in zip(*given, strict=True)
        ]
        cross_entropy, variation, hits = (torch.cat(x) for x in zip(*done, strict=True))
        confidence = torch.zeros_like(cross_entropy)
        if self.confidence_head is not None:
            # FSDP wants no view of another tensor
            confidence = self.confidence_head(hidden, embeddings).float().clone()
        return cross_entropy, variation, hits, confidence


def base_logits(hidden: Tensor, frozen: Frozen) -> Tensor:
    """Return the head's product with states [..., H]: [..., V], float32 or wider.

    Neither scale nor soft cap of the target's: engines leave them out for this method's drafts.
    """
    dtype = frozen.lm_head.dtype
    return F.linear(frozen.states(hidden).to(dtype), frozen.lm_head).to(wide(dtype))


def compare(
    hidden: Tensor, latents: Tensor, finals: Tensor, labels: Tensor, frozen: Frozen, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy, variation and hits of some rows, whose logits are made here."""
    logits = base_logits(hidden, frozen) + F.linear(latents, w2)
    with torch.no_grad():
        target = torch.softmax(frozen.own_logits(base_logits(finals, frozen)), dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    variation = (log_probs.exp() - target).abs().sum(dim=-1)
    cross_entropy = -log_probs.gather(1, labels[:, None]).squeeze(1)
    return cross_entropy, variation, logits.argmax(dim=-1) == labels
