"""The P-EAGLE draft: a few decoder layers that draft all tokens in one pass.

The first layer reads concat(norm(embedding), norm(feature)).  Depths above 0 have no token and no
feature yet: they read the mask token's embedding and a learned state in place of captured ones.
Shapes as in `elements`: N tokens, E elements; H hidden size, h heads of d, v key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from specforge_eagle3.config import DraftShape
from specforge_eagle3.head import DraftHead, Teacher, VocabularyModel
from specforge_eagle3.model import Outputs, Projections
from torch import Tensor, nn

from specforge_core.float8 import in_float8, linears
from specforge_core.nn.rotary import rotate
from specforge_core.nn.soft_loss import SoftRows

from .config import PeagleConfig
from .elements import Elements

# of layer `index`, from queries [E, h, d], keys and values [E, v, d] to [E, h, d].  Positions and
# visibility are what it holds: FSDP's mixed precision would cast tensors that layers are given,
# and RoPE needs float32
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Embed: TypeAlias = Callable[[Tensor], Tensor]


class Before(Projections):
    """From a layer's input to its queries, keys and values, before they are rotated."""

    def forward(self, hidden: Tensor, embeddings: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return [n, h, d] and twice [n, v, d] for states [n, H], and in the first embeddings."""
        x = self.input_layernorm(hidden if embeddings is None else embeddings)
        if self.hidden_norm is not None:
            x = torch.cat([x, self.hidden_norm(hidden)], dim=-1)
        parts = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.view(len(part), -1, self.head_dim) for part in parts)
        return self.q_norm(q), self.k_norm(k), v


class After(Outputs):
    """From attention's output to the layer's."""

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """Return [n, H] for attention's output [n, h * d] and the layer's input."""
        return self.mix(attended, hidden)[0]


class PeagleLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: DraftShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.before = Before(shape, first=index == 0)
        self.after = After(shape)

    def forward(
        self, hidden: Tensor, embeddings: Tensor | None, deeper: int, attend: Attend
    ) -> Tensor:
        """Return [E, H] for states [E, H].

        With embeddings, in the first layer, both are of the tokens and of the mask: [N + 1, H];
        what the mask gives is the same for all `deeper` elements.
        """
        q, k, v = self.before(hidden, embeddings)
        if embeddings is not None:
            q, k, v, hidden = (
                torch.cat([x[:-1], x[-1:].expand(deeper, *x.shape[1:])]) for x in (q, k, v, hidden)
            )
        out: Tensor = self.after(attend(self.index, q, k, v).flatten(1), hidden)
        return out


class PeagleModel(VocabularyModel):
    """The trained part, and the draft vocabulary it is for."""

    def __init__(self, shape: DraftShape, config: PeagleConfig, mask_token_id: int) -> None:
        super().__init__(shape, config)
        self.mask_token_id = mask_token_id
        width, own = shape.hidden_size, config.train_embedding
        self.embed_tokens = nn.Embedding(shape.vocab_size, width) if own else None
        self.mask_hidden = nn.Parameter(torch.empty(self.fc.in_features))
        self.layers = nn.ModuleList(PeagleLayer(shape, i) for i in range(shape.num_layers))
        self.norm = nn.RMSNorm(width, eps=shape.rms_norm_eps)
        self.lm_head = DraftHead(shape, config)

    def forward(
        self, features: Tensor, ids: Tensor, embed: Embed, elements: Elements, teacher: Teacher
    ) -> tuple[Tensor, SoftRows]:
        """Return the sum of the losses of the elements that are trained, and each one's row.

        features [N, 3H] are the captured states; ids [N + 1] of the tokens behind each, and of
        the mask.  `embed` gives the target's embeddings, read if the draft has none of its own.
        """
        states = self.states(features, ids, embed, elements.places, elements.attend)
        trained = states.index_select(0, elements.trained)[:, None]
        losses: tuple[Tensor, SoftRows] = self.lm_head(trained, teacher, float8=in_float8(self))
        return losses

    def states(
        self, features: Tensor, ids: Tensor, embed: Embed, places: Tensor, attend: Attend
    ) -> Tensor:
        """Return the normed states [E, H] that the head reads, of elements at `places` [E]."""
        dtype, deeper = self.fc.weight.dtype, len(places) - len(features)
        hidden = self.fc(torch.cat([features.to(dtype), self.mask_hidden[None]]))
        embeddings, rope = (self.embed_tokens or embed)(ids).to(dtype), self.rotary(places)

        def rotated(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(index, rotate(q, rope), rotate(k, rope), v)

        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, None if i else embeddings, deeper, rotated)
        out: Tensor = self.norm(hidden)
        return out
