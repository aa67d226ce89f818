"""The DFlash 2 draft: a DFlash draft with convolutions in its layers, and a selector behind it."""

from __future__ import annotations

import torch
from specforge_dflash.around import slot_states
from specforge_dflash.model import DFlashModel, Frozen
from specforge_dflash.step import drafting_rows, teachers
from torch import Tensor, nn

from specforge_core.types import Batch

from .config import DFlash2Config
from .convolution import convolve
from .selector import CandidateSelector, candidates


class DFlash2Model(nn.Module):
    """The trained part.  Made around a DFlash draft, it drafts what that one drafts."""

    def __init__(self, config: DFlash2Config, backbone: DFlashModel) -> None:
        super().__init__()
        self.config = config
        shape = backbone.shape
        convolve(backbone, config.conv_kernel_size, config.conv_group_size)
        self.backbone = backbone
        selector = CandidateSelector(shape.vocab_size, shape.hidden_size, config.selector_rank)
        draw = torch.Generator().manual_seed(config.seed + 1)  # not what the layers were drawn from
        for weight in (selector.predecessor_codebook, selector.hidden_projection.weight):
            nn.init.normal_(weight, std=shape.init_std, generator=draw)
        self.candidate_selector = selector

    def forward(self, batch: Batch, frozen: Frozen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what a train step needs of the R slots that are trained.

        States to multiply with the head [R, its width]; scores of the candidates [R, K] with the
        label among them; where it is [R]; and whether it was there by itself [R].
        """
        config, rows = self.config, batch["rows"]
        labels = batch["labels"].flatten()[rows]
        # the token whose final state the label's distribution is made from is the one before it
        before = teachers(config, batch).flatten()[drafting_rows(config, batch)]
        previous = batch["input_ids"].flatten()[before]
        states = slot_states(self.backbone, frozen, batch).flatten(0, 1)[rows]
        scaled = frozen.states(states) * config.output_multiplier
        kept = (states.detach(), scaled.detach()) if config.detach_selector else (states, scaled)
        ids, logits, found = candidates(
            kept[1],
            frozen.lm_head,
            labels,
            config.selector_top_k,
            softcap=frozen.softcap,
            chunk=config.head_chunk,
        )
        scores = self.candidate_selector(kept[0], previous, ids, logits)
        return scaled, scores, (ids == labels[:, None]).int().argmax(1), found
