"""The Domino draft: DFlash's backbone, and a correction of its logits by the tokens before.

Names of the correction's parameters are those of the published checkpoints; the backbone's
have `backbone.` before them.  Shapes: b rows, A blocks, B slots of a block, D of them that
predict, M = b*A blocks in all, H hidden size, G size of the GRU's state, r rank, R trained slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from specforge_dflash.model import DFlashModel
from torch import Tensor, nn

from specforge_core.nn.decoder import init_weights

from .config import DominoConfig
from .loss import Scored

# from states [R, H], codes [R, r] and the correction's last matrix [V, r] to the slots' scores,
# and what their loss is divided by
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Scored, Tensor]]


class PrefixGRU(nn.Module):
    """A GRU without biases over a block's tokens; parameters as `nn.GRU` names them.

    No `nn.GRU`: it keeps its parameters in a list of its own, which sharding does not replace.
    """

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden, hidden))
        bound, generator = 1 / math.sqrt(hidden), torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound, generator=generator)  # as torch's own

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> Tensor:
        """Return the state after each token [M, D, G], for embeddings [M, D, H] behind `state`."""
        weights = self.weight_ih_l0, self.weight_hh_l0
        if state is None:
            state = weights[1].new_zeros(len(tokens), weights[1].shape[1])
        states = []
        for token in tokens.to(state.dtype).unbind(1):
            state = torch.gru_cell(token, state, *weights)
            states.append(state)
        return torch.stack(states, dim=1)


class DominoModel(nn.Module):
    """The trained part: everything but the target's embedding and head."""

    def __init__(self, backbone: DFlashModel, config: DominoConfig) -> None:
        super().__init__()
        shape = backbone.shape
        self.backbone = backbone
        self.first_slot = config.first_slot
        self.pure = config.pure_draft_prefix_len
        self.prefix_gru = PrefixGRU(shape.hidden_size, config.gru_hidden_dim, config.seed)
        down = nn.Linear(shape.hidden_size + config.gru_hidden_dim, config.emb_dim, bias=False)
        self.embed_proj = nn.Sequential(
            down, nn.SiLU(), nn.Linear(config.emb_dim, shape.vocab_size, bias=False)
        )
        init_weights(self.embed_proj, shape.init_std, config.seed)

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        anchors: Tensor,
        starts: Tensor,
        positions: Tensor,
        prefixes: Tensor,
        rows: Tensor,
        score: Score,
    ) -> tuple[Scored, Tensor]:
        """Return what `score` makes of the trained slots.

        It is called in here, where a sharded model's parameters are whole.  `prefixes`
        [M, D, H] are the embeddings of the text from each anchor on, `rows` [R] the trained
        slots, counted over all M * B; the others are those of DFlashModel.
        """
        hidden = self.backbone(features, embeddings, anchors, starts, positions)
        states = self.prefix_gru(prefixes)
        inputs = hidden.flatten(0, 1)[rows]
        # slot k reads the text up to the token before the one it predicts
        before = F.pad(states, (0, 0, self.first_slot, 0)).flatten(0, 1)[rows]
        corrected = rows % self.backbone.shape.block_size - self.first_slot >= self.pure
        codes = self.codes(inputs, before) * corrected[:, None]
        return score(inputs, codes, self.embed_proj.get_parameter("2.weight"))

    def codes(self, hidden: Tensor, states: Tensor) -> Tensor:
        """Return the low-rank form of the correction [..., r], for [..., H] and [..., G]."""
        joined = torch.cat([hidden, states.to(hidden.dtype)], dim=-1)
        out: Tensor = self.embed_proj[1](self.embed_proj[0](joined))
        return out
