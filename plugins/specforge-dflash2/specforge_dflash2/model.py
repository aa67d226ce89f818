"""The DFlash 2 draft: a DFlash draft with convolutions in its layers, and a selector behind it."""

from __future__ import annotations

import torch
from specforge_dflash.model import DFlashModel
from torch import Tensor, nn

from specforge_core.target.head import widen

from .config import DFlash2Config
from .convolution import ConvLayer, GroupedConv
from .selector import CandidateSelector, candidates


class DFlash2Model(nn.Module):
    """The trained part.  Made around a DFlash draft, it drafts what that one drafts."""

    def __init__(self, config: DFlash2Config, backbone: DFlashModel) -> None:
        super().__init__()
        self.config = config
        shape = backbone.shape
        width = shape.hidden_size

        def conv() -> GroupedConv:
            taps, group = config.conv_kernel_size, config.conv_group_size
            return GroupedConv(width, shape.block_size, taps, group)

        backbone.layers = nn.ModuleList(ConvLayer(x, conv(), conv()) for x in backbone.layers)  # type: ignore[arg-type]
        self.backbone = backbone
        self.candidate_selector = CandidateSelector(shape.vocab_size, width, config.selector_rank)
        draw = torch.Generator().manual_seed(config.seed + 1)  # not what the layers were drawn from
        for weight in (
            self.candidate_selector.predecessor_codebook,
            self.candidate_selector.hidden_projection.weight,
        ):
            nn.init.normal_(weight, std=shape.init_std, generator=draw)

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        anchors: Tensor,
        starts: Tensor,
        positions: Tensor,
        rows: Tensor,
        previous: Tensor,
        labels: Tensor,
        head: Tensor,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what a train step needs of the R slots that are trained.

        The first five are DFlash's; rows [R] count the slots of all blocks; previous and labels
        [R] are the true tokens before and at each slot; head is the target's, frozen, [V, H] or
        wider.

        Returns states to multiply with the head [R, its width]; scores of the candidates [R, K]
        with the label among them; where it is [R]; and whether it was there by itself [R].
        """
        states = self.backbone(features, embeddings, anchors, starts, positions)
        states = states.flatten(0, 1)[rows]
        scaled = scale(widen(states, head.shape[1]), self.config.output_multiplier)
        config = self.config
        kept = (states.detach(), scaled.detach()) if config.detach_selector else (states, scaled)
        ids, logits, found = candidates(
            kept[1], head, labels, config.selector_top_k, softcap=softcap, chunk=config.head_chunk
        )
        scores = self.candidate_selector(kept[0], previous, ids, logits)
        return scaled, scores, (ids == labels[:, None]).int().argmax(1), found


def scale(states: Tensor, multiplier: float) -> Tensor:
    """Return states whose logits are `multiplier` times those of `states`."""
    return states if multiplier == 1.0 else states * multiplier
