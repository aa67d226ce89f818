"""The P-EAGLE draft: a few decoder layers that draft all tokens in one pass.

The first layer reads concat(norm(embedding), norm(feature)).  Depths above 0 have no token and no
feature yet: they read the mask token's embedding and a learned state in place of captured ones.
Shapes: N tokens, M deeper elements, E = N + M, V elements that are trained, H hidden size, h heads
of d, v key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.nn.decoder import init_weights
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.nn.rotary import Rope, Rotary, rotate
from specforge_core.nn.soft_loss import SoftLoss, SoftRows
from specforge_core.target.head import widen
from specforge_core.types import Batch

from .attention import Elements
from .config import PeagleShape

# of layer `index`, from queries [E, h, d], keys and values [E, v, d] to [E, h, d]
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Task:
    """What the objective wants of one batch.

    No dataclass: FSDP's mixed precision casts the tensors in those.
    """

    def __init__(self, batch: Batch, teacher_head: Tensor, loss: SoftLoss) -> None:
        self.elements = Elements(batch)
        self.places = batch["position_ids"][0][batch["anchors"]] + batch["depth"]  # [E]
        self.trained = batch["trained"]  # [V]
        self.teacher = batch["final"][batch["labels"]]  # [V, H]
        self.logsumexp = batch["logsumexp"][batch["labels"]]  # [V]
        self.teacher_head = teacher_head  # [Vd, H], or wider with a bias
        self.loss = loss


class Before(nn.Module):
    """From a layer's input to its queries, keys and values, before they are rotated."""

    def __init__(self, shape: PeagleShape, index: int) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(width, eps=eps)  # in the first layer of the embedding
        self.hidden_norm = nn.RMSNorm(width, eps=eps) if index == 0 else None  # of the feature
        read, narrow = width * (2 if index == 0 else 1), shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(read, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(read, narrow, bias=False)
        self.v_proj = nn.Linear(read, narrow, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(shape.head_dim, eps=eps) if shape.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, hidden: Tensor, embeddings: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return [n, h, d] and twice [n, v, d] for states [n, H], and in the first embeddings."""
        if self.hidden_norm is None or embeddings is None:
            x = self.input_layernorm(hidden)
        else:
            x = torch.cat([self.input_layernorm(embeddings), self.hidden_norm(hidden)], dim=-1)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v


class After(nn.Module):
    """From attention's output to the layer's."""

    def __init__(self, shape: PeagleShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=shape.rms_norm_eps)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """Return [n, H] for attention's output [n, h * d] and the layer's input."""
        hidden = hidden + self.o_proj(attended)
        x = self.post_attention_layernorm(hidden)
        out: Tensor = hidden + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PeagleLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: PeagleShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.before = Before(shape, index)
        self.after = After(shape)

    def forward(self, hidden: Tensor, embeddings: Tensor | None, deeper: int, run: Pass) -> Tensor:
        """Return [E, H] for states [E, H].

        With embeddings, in the first layer, both are of the tokens and of the mask: [N + 1, H];
        what the mask gives is the same for all `deeper` elements.
        """
        q, k, v = self.before(hidden, embeddings)
        if embeddings is not None:
            q, k, v, hidden = (_spread(x, deeper) for x in (q, k, v, hidden))
        q, k = rotate(q, run.rope), rotate(k, run.rope)
        out: Tensor = self.after(run.attend(self.index, q, k, v).flatten(1), hidden)
        return out


def _spread(x: Tensor, deeper: int) -> Tensor:
    """Return [N + deeper, ..] for [N + 1, ..]: the last row as often as asked."""
    return torch.cat([x[:-1], x[-1:].expand(deeper, *x.shape[1:])])


class Pass:
    """Positions and visibility of one pass, shared by all layers.

    No dataclass: FSDP's mixed precision would cast the tensors in one, and RoPE needs float32.
    """

    def __init__(self, rope: Rope, attend: Attend) -> None:
        self.rope = rope
        self.attend = attend


class PeagleModel(nn.Module):
    """The trained part, and the draft vocabulary it is for."""

    d2t: Tensor  # [Vd] int64, offsets
    t2d: Tensor  # [vocabulary] bool

    def __init__(
        self, shape: PeagleShape, attention: str, head_chunk: int, train_embedding: bool
    ) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.head_chunk = head_chunk
        self.rotary = Rotary(shape.rope, shape.head_dim, shape.max_positions)
        width, captured = shape.hidden_size, len(shape.capture_layers) * shape.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, width) if train_embedding else None
        self.mask_hidden = nn.Parameter(torch.empty(captured))
        self.fc = nn.Linear(captured, width, bias=False)
        self.layers = nn.ModuleList(PeagleLayer(shape, i) for i in range(shape.num_layers))
        self.norm = nn.RMSNorm(width, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(width, shape.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(shape.vocab_size, dtype=torch.bool))

    def init_weights(self, seed: int) -> None:
        """Fill the weights from `seed` alone, but for the embedding, which is the target's."""
        init_weights(self, self.shape.init_std, seed)
        nn.init.normal_(self.mask_hidden, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.d2t)
        nn.init.ones_(self.t2d)

    def forward(self, features: Tensor, inputs: Tensor, task: Task) -> tuple[Tensor, SoftRows]:
        """Return the sum of the losses of the elements that are trained, and each one's row.

        features [N, 3H] are the captured states; `inputs` are ids [N + 1] of the tokens behind
        each and of the mask, or their embeddings [N + 1, H] where those are the target's.
        """
        elements = task.elements
        states = self.states(
            features,
            inputs,
            Pass(
                self.rotary(task.places),
                lambda _, q, k, v: elements.attend(q, k, v, self.attention),
            ),
            len(task.places) - len(features),
        )
        weights = torch.ones(len(task.trained), 1, device=states.device)
        return linear_soft_cross_entropy(
            states.index_select(0, task.trained)[:, None],
            self.lm_head.weight,
            widen(task.teacher, task.teacher_head.shape[1]),
            task.teacher_head,
            weights,
            task.loss,
            teacher_softcap=self.shape.softcap,
            teacher_logsumexp=task.logsumexp,
            chunk=self.head_chunk,
        )

    def states(self, features: Tensor, inputs: Tensor, run: Pass, deeper: int) -> Tensor:
        """Return the normed states [N + deeper, H] that the head reads."""
        dtype = self.fc.weight.dtype
        hidden = self.fc(torch.cat([features.to(dtype), self.mask_hidden[None]]))
        embeddings = inputs if self.embed_tokens is None else self.embed_tokens(inputs)
        first: Tensor | None = embeddings.to(dtype)
        for layer in self.layers:
            hidden = layer(hidden, first, deeper, run)
            first = None
        out: Tensor = self.norm(hidden)
        return out
