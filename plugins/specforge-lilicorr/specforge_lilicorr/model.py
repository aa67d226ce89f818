"""The LiLiCorr draft: a DFlash backbone, and a lattice over its slots' likeliest tokens.

Shapes: L lattices, one of each block, D slots of each, R = L*D, K candidates of a slot, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import torch
from specforge_dflash.around import slot_states
from specforge_dflash.model import DFlashModel, Frozen
from specforge_dflash.step import teachers
from specforge_dflash2.convolution import convolve
from torch import Tensor, nn

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.nn.linear_top_k import linear_top_k
from specforge_core.types import Batch

from .config import LiLiCorrConfig
from .lattice import Lattice, scores


class LiLiCorrModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, config: LiLiCorrConfig, backbone: DFlashModel) -> None:
        super().__init__()
        self.config = config
        shape = backbone.shape
        if config.conv_kernel_size:
            convolve(backbone, config.conv_kernel_size, config.conv_group_size)
        self.backbone = backbone
        self.lilicorr = Lattice(config, shape.hidden_size, shape.rms_norm_eps, shape.init_std)

    def forward(self, batch: Batch, frozen: Frozen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compare every slot that drafts with its label.

        Return the head's cross-entropy and likeliest token [R], the candidates [R, K], likeliest
        first, and their scores [R, K] behind the true candidate of the slot before.

        Candidates of all slots see each other, when drafting as in training: those of slots without
        a label are in the lattice too.  They are scored behind the label of the slot before where
        it is a candidate; where it is none, nothing behind it counts.
        """
        hidden = slot_states(self.backbone, frozen, batch)
        states = hidden.reshape(-1, self.config.block_size, hidden.shape[-1])[:, 1:]
        labels = batch["labels"].flatten(0, 1)[:, 1:]
        before = (teachers(self.config, batch)[:, 0] - 1).clamp(min=0)  # of a block, if anchored
        context = self.backbone.context(batch["hidden_states"].flatten(0, 1)[before])
        anchored = (batch["anchors"] > batch["starts"]).flatten()
        losses, best, ids, log_probs = candidates(states, labels, frozen, self.config)
        vectors = self.lilicorr(frozen.embed(ids), log_probs, states, context, anchored)
        gold = (ids == labels[..., None]).int().argmax(-1)
        chosen = torch.take_along_dim(vectors.outs[:, :-1], gold[:, :-1, None, None], dim=2)
        before = torch.cat([vectors.anchors[:, None], chosen.squeeze(2)], dim=1)
        found = scores(before.flatten(0, 1), vectors.ins.flatten(0, 1), self.config.logit_scale)
        return losses, best, ids.flatten(0, 1), found


def candidates(
    states: Tensor, labels: Tensor, frozen: Frozen, config: LiLiCorrConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cross-entropy and best token [R], candidates and their log-probabilities [L, D, K].

    states [L, D, H] and labels [L, D]; the log-probabilities are over the whole vocabulary.
    """
    wide, rows = frozen.states(states.flatten(0, 1)), labels.flatten()
    head, cap, chunk = frozen.lm_head, frozen.softcap, config.head_chunk
    losses, best = linear_cross_entropy(wide, head, rows, softcap=cap, chunk=chunk)
    top_k = config.candidate_top_k
    ids, logits = linear_top_k(wide, head, top_k, also=rows, softcap=cap, chunk=chunk)
    # a label's loss and its logit give the sum over all tokens
    log_probs = logits[:, :-1] - (losses + logits[:, -1])[:, None]
    shape = *labels.shape, top_k
    return losses, best, ids[:, :-1].reshape(shape), log_probs.view(shape)
