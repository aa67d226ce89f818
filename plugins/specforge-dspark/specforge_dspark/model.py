"""The DSpark draft: a DFlash backbone with a Markov head and a confidence head.

Shapes: b rows, S tokens, A blocks of a row, B slots of a block, M = b*A blocks, D slots of a
block that draft, R slots that are trained, H hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from specforge_dflash.around import slot_states
from specforge_dflash.model import DFlashModel, Frozen
from specforge_dflash.step import drafting_rows, teachers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specforge_core.nn.soft_loss import wide
from specforge_core.types import Batch

from .config import DSparkConfig
from .heads import ConfidenceHead, MarkovHead


class Slots(NamedTuple):
    """What each trained slot came to, all [R].

    A tuple, which FSDP looks into for the tensors that a backward starts from.
    """

    cross_entropy: Tensor
    variation: Tensor  # sum over the vocabulary of |p - q|
    hits: Tensor  # bool: the most likely token is the label
    confidence: Tensor  # logits; 0 without a confidence head


class DSparkModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, backbone: DFlashModel, config: DSparkConfig) -> None:
        super().__init__()
        shape = backbone.shape
        self.config = config
        width, rank, confidence = shape.hidden_size, config.markov_rank, None
        with torch.device("meta"):
            markov = MarkovHead(config.markov_head, shape.vocab_size, width, rank)
            if config.confidence_head:
                confidence = ConfidenceHead(width, rank, with_markov=config.confidence_with_markov)
        heads = nn.ModuleList([markov] if confidence is None else [markov, confidence])
        heads.to_empty(device=backbone.fc.weight.device)
        draws = torch.Generator().manual_seed(config.seed)  # alike on every rank
        for name, parameter in heads.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=shape.init_std, generator=draws)
        self.backbone, self.markov_head, self.confidence_head = backbone, markov, confidence

    def forward(self, batch: Batch, frozen: Frozen) -> Slots:
        """Compare every trained slot with its label and with the target's distribution.

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
        return Slots(cross_entropy, variation, hits, confidence)


def base_logits(hidden: Tensor, frozen: Frozen) -> Tensor:
    """Return the head's product with states [..., H]: [..., V], float32 or wider.

    Neither scale nor soft cap of the target's: engines leave them out for this method's drafts.
    """
    dtype = frozen.lm_head.dtype
    return F.linear(frozen.states(hidden).to(dtype), frozen.lm_head).to(wide(dtype))


def draft_logits(hidden: Tensor, latents: Tensor, frozen: Frozen, w2: Tensor) -> Tensor:
    """Return logits [..., V], float32 or wider, for states [..., H] and latents [..., r]."""
    base = base_logits(hidden, frozen)
    return base + F.linear(latents, w2).to(base.dtype)


def compare(
    hidden: Tensor, latents: Tensor, finals: Tensor, labels: Tensor, frozen: Frozen, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy, variation and hits of some rows, whose logits are made here."""
    logits = draft_logits(hidden, latents, frozen, w2)
    with torch.no_grad():
        target = torch.softmax(frozen.own_logits(base_logits(finals, frozen)), dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    variation = (log_probs.exp() - target).abs().sum(dim=-1)
    cross_entropy = -log_probs.gather(1, labels[:, None]).squeeze(1)
    return cross_entropy, variation, logits.argmax(dim=-1) == labels
