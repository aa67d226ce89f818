"""The DSpark draft: a DFlash backbone with a Markov head and a confidence head.

Shapes: b rows, S tokens, A blocks of a row, B slots of a block, M = b*A blocks, D slots of a
block that draft, R slots that are trained, H hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from specforge_dflash.model import DFlashModel, Frozen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specforge_core.nn.soft_loss import wide
from specforge_core.target.measure import HeadScale
from specforge_core.types import Batch

from .config import DSparkConfig
from .heads import ConfidenceHead, MarkovHead, init_heads


class Slots(NamedTuple):
    """What each trained slot came to, all [R].

    A tuple, which FSDP looks into for the tensors that a backward starts from.
    """

    cross_entropy: Tensor
    variation: Tensor  # sum over the vocabulary of |p - q|
    hits: Tensor  # bool: the most likely token is the label
    confidence: Tensor  # logits; 0 without a confidence head


class Target(Frozen):
    """The target's embedding and head, also to say what the target itself would draw."""

    def __init__(self, frozen: Frozen, beside: HeadScale) -> None:
        super().__init__(frozen.embed_tokens, frozen.lm_head, frozen.scale, beside.softcap)
        self.lm_head = self.embed_tokens if frozen.lm_head is frozen.embed_tokens else self.lm_head
        self.head_scale = beside.scale

    def distribution(self, finals: Tensor) -> Tensor:
        """Return the target's probabilities [..., V] behind normed final states [..., H]."""
        out = self.base_logits(finals) * self.head_scale
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return torch.softmax(out, dim=-1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Return the head's product with states [..., H]: [..., V], float32 or wider.

        Neither scale nor soft cap of the target's: engines leave them out for this method's drafts.
        """
        dtype = self.lm_head.dtype
        return F.linear(self.states(hidden).to(dtype), self.lm_head).to(wide(dtype))


class DSparkModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, backbone: DFlashModel, config: DSparkConfig) -> None:
        super().__init__()
        shape = backbone.shape
        self.config = config
        with torch.device("meta"):
            markov = MarkovHead(
                config.markov_head, shape.vocab_size, shape.hidden_size, config.markov_rank
            )
            confidence = ConfidenceHead(
                shape.hidden_size, config.markov_rank, with_markov=config.confidence_with_markov
            )
        heads = nn.ModuleList([markov, confidence] if config.confidence_head else [markov])
        heads.to_empty(device=backbone.fc.weight.device)
        init_heads(heads, shape.init_std, config.seed)
        self.backbone = backbone
        self.markov_head = markov
        self.confidence_head = confidence if config.confidence_head else None

    def forward(self, batch: Batch, frozen: Target) -> Slots:
        """Compare every trained slot with its label and with the target's distribution.

        The token before a slot is the data's own, which a served draft has too as long as
        all it drafted before was right.
        """
        hidden = self.backbone(
            batch["hidden_states"],
            frozen.embed(batch["block_ids"].flatten(1)),
            batch["anchors"],
            batch["starts"],
            batch["position_ids"],
        )
        block, first = self.config.block_size, self.config.first_slot
        hidden = hidden.reshape(-1, block, hidden.shape[-1])[:, first:]
        labels = batch["labels"].flatten(0, 1)[:, first:]
        known = batch["block_ids"].flatten(0, 1)[:, :1]
        embeddings = self.markov_head.markov_w1(torch.cat([known, labels[:, :-1]], dim=1))
        latents = self.markov_head(embeddings, hidden)
        # counted over the slots that draft
        rows = batch["rows"] // block * (block - first) + batch["rows"] % block - first
        hidden, labels, embeddings, latents = (
            x.flatten(0, 1)[rows] for x in (hidden, labels, embeddings, latents)
        )
        finals = batch["final"].flatten(0, 1)[batch["teachers"]]
        cross_entropy, variation, hits = self._compare(hidden, latents, finals, labels, frozen)
        confidence = torch.zeros_like(cross_entropy)
        if self.confidence_head is not None:
            # FSDP wants no view of another tensor
            confidence = self.confidence_head(hidden, embeddings).float().clone()
        return Slots(cross_entropy, variation, hits, confidence)

    def _compare(
        self, hidden: Tensor, latents: Tensor, finals: Tensor, labels: Tensor, frozen: Target
    ) -> tuple[Tensor, ...]:
        """Return cross-entropy, variation and hits [R], some rows' logits at a time."""
        rows = (torch.split(x, self.config.head_chunk) for x in (hidden, latents, finals, labels))
        parts = zip(*rows, strict=True)
        head = frozen, self.markov_head.markov_w2.weight
        done = [
            # the logits of all rows would not fit: they are made again in the backward pass
            checkpoint(compare, *part, *head, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return tuple(torch.cat(column) for column in zip(*done, strict=True))


def draft_logits(hidden: Tensor, latents: Tensor, frozen: Target, w2: Tensor) -> Tensor:
    """Return logits [..., V], float32 or wider, for states [..., H] and latents [..., r]."""
    base = frozen.base_logits(hidden)
    return base + F.linear(latents, w2).to(base.dtype)


def compare(
    hidden: Tensor, latents: Tensor, finals: Tensor, labels: Tensor, frozen: Target, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy, variation and hits of some rows, whose logits are made here."""
    logits = draft_logits(hidden, latents, frozen, w2)
    with torch.no_grad():
        target = frozen.distribution(finals)
    log_probs = torch.log_softmax(logits, dim=-1)
    variation = (log_probs.exp() - target).abs().sum(dim=-1)
    cross_entropy = -log_probs.gather(1, labels[:, None]).squeeze(1)
    return cross_entropy, variation, logits.argmax(dim=-1) == labels
