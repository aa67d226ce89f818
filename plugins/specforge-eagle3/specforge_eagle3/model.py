"""The EAGLE-3 draft: one decoder layer that is fed its own output, step after step.

Attention reads concat(norm(embedding), norm(feature)).  The embedding's half of that
product is the same for a token at whatever step it is read, so it is made once.
Shapes: N tokens, H hidden size, h heads of d, v key/value heads, R steps, U labels,
Vd draft vocabulary, Q = (h + 2 v) d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from specforge_core.float8 import in_float8, quantise_weight
from specforge_core.nn.rotary import Rope, rotate
from specforge_core.nn.soft_loss import SoftLoss, SoftRows
from specforge_core.types import Batch

from .attention import KeyValue, attend
from .config import DraftShape, VocabularyOptions
from .head import DraftHead, Teacher, VocabularyModel
from .rows import Documents
from .summed import Tapped, Use, linear, multiplied


class _Gather(torch.autograd.Function):
    """Rows of a matrix [M, H] by index; no present row is taken twice.

    So the backward can copy where indexing would have to sort, or to add atomically.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, present: Tensor) -> Tensor:
        ctx.count = len(states)
        ctx.save_for_backward(places.masked_fill(~present, len(states)))
        return states[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        grad = d_rows.new_zeros(ctx.count + 1, d_rows.shape[-1])  # the last row for what is absent
        grad.index_copy_(0, places.flatten(), d_rows.flatten(0, 1))
        return grad[: ctx.count], None, None


class Task(Teacher):
    """What the objective wants of one batch."""

    def __init__(self, batch: Batch, teacher_head: Tensor, loss: SoftLoss) -> None:
        super().__init__(batch, teacher_head, loss)
        self.documents = Documents.of(batch)
        self.students, self.present = batch["students"], batch["present"]  # [U, R]


class Projections(nn.Module):
    """What a layer has in front of attention; one that is not its draft's first reads no token."""

    def __init__(self, shape: DraftShape, *, first: bool = True) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.sizes = [n * shape.head_dim for n in (shape.num_heads, *(shape.num_kv_heads,) * 2)]
        width, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(width, eps=eps)  # of the embedding in a first layer
        self.hidden_norm = nn.RMSNorm(width, eps=eps) if first else None  # of the feature
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(2 * width if first else width, size, bias=False) for size in self.sizes
        )
        self.q_norm, self.k_norm = (
            nn.RMSNorm(shape.head_dim, eps=eps) if shape.qk_norm else nn.Identity()
            for _ in range(2)
        )


class BeforeAttention(Projections):
    """From a feature, and the embedding's half of the product, to queries, keys and values."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the halves of the joint projection, [Q, H] each: embedding's and feature's."""
        halves = [layer.weight.chunk(2, dim=1) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        left, right = zip(*halves, strict=True)
        return torch.cat(left), torch.cat(right)

    def forward(
        self,
        feature: Tensor,
        embedded: Tensor,
        weight: Tensor,
        rope: Rope,
        use: Use | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q [N, h, d], k and v [N, v, d] of features [N, H] and `embedded` [N, Q].

        The fourth is what `weight` was multiplied with [N, H], a constant.
        """
        assert self.hidden_norm is not None
        x = self.hidden_norm(feature)
        joint = embedded + linear(x, weight, use)
        parts = torch.split(joint, self.sizes, dim=-1)
        q, k, v = (part.reshape(len(part), -1, self.head_dim) for part in parts)
        return rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v, x.detach()


class Outputs(nn.Module):
    """What a layer has behind attention."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=shape.rms_norm_eps)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def weights(self, *, joint: bool) -> tuple[Tensor, ...]:
        """Return what `mix` multiplies with, in the order of its uses.

        `joint`: those of the MLP that read the same below each other.
        """
        both = self.gate_proj.weight, self.up_proj.weight
        middle = (torch.cat(both),) if joint else both
        return self.o_proj.weight, *middle, self.down_proj.weight

    def mix(
        self, attended: Tensor, hidden: Tensor, uses: Sequence[Use] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output [N, H] for attention's [N, h * d] and the layer's input.

        The others are what the MLP's weights were multiplied with, [N, H] and [N, I].
        `uses` are those of a step of its `weights`.
        """
        hidden = hidden + multiplied(attended, uses[:1], self.o_proj)[0]
        x = self.post_attention_layernorm(hidden)
        gate, up = multiplied(x, uses[1:-1], self.gate_proj, self.up_proj)
        inner = F.silu(gate) * up
        return hidden + multiplied(inner, uses[-1:], self.down_proj)[0], x, inner


class AfterAttention(Outputs):
    """From attention's output to the step's state, as it is and normed for the head."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__(shape)
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(
        self, attended: Tensor, feature: Tensor, uses: Sequence[Use] = ()
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return [N, H] twice, for attention's output [N, h * d] and the un-normed feature.

        The third and fourth are what the MLP's weights were multiplied with, [N, H] and [N, I]:
        constants.
        """
        hidden, x, inner = self.mix(attended, feature, uses)
        return hidden, self.norm(hidden), x.detach(), inner.detach()


class Eagle3Model(VocabularyModel):
    """The trained part, and the draft vocabulary it is for."""

    def __init__(self, shape: DraftShape, config: VocabularyOptions) -> None:
        super().__init__(shape, config)
        width, eps, captured = shape.hidden_size, shape.rms_norm_eps, len(shape.capture_layers)
        norms = [nn.RMSNorm(width, eps=eps) for _ in range(captured if shape.fc_norm else 0)]
        self.fc_norm = nn.ModuleList(norms)
        self.before = BeforeAttention(shape)
        self.after = AfterAttention(shape)
        self.lm_head = DraftHead(shape, config)

    def forward(self, features: Tensor, embeddings: Tensor, task: Task) -> tuple[Tensor, SoftRows]:
        """Return the weighted sum of the losses of all steps, and each label's rows.

        features [N, 3H] are the captured states, embeddings [N, H] the tokens'.
        """
        steps = task.students.shape[1]
        states = torch.cat(self.unroll(features, embeddings, task.documents, steps))  # [R N, H]
        places = task.students + torch.arange(steps, device=states.device) * len(features)
        by_label: Tensor = _Gather.apply(states, places, task.present)  # type: ignore[no-untyped-call]
        losses: tuple[Tensor, SoftRows] = self.lm_head(by_label, task, float8=in_float8(self))
        return losses

    def unroll(
        self, features: Tensor, embeddings: Tensor, documents: Documents, steps: int
    ) -> list[Tensor]:
        """Return each step's states [N, H], normed as the head reads them.

        Row t of step i reads embedding t+1+i.  Rows whose document ends before that read
        something else; nothing that has a label depends on them.
        """
        weight_embedding, weight_feature = self.before.weights()
        embedded = self.embedded(embeddings, weight_embedding)
        embedded = F.pad(embedded, (0, 0, 0, steps))  # [N + R, Q]
        count = len(features)
        feature = self.fuse(features)
        float8 = in_float8(self)
        weights = weight_feature, *self.after.weights(joint=float8)
        narrow = [quantise_weight(w) if float8 else None for w in weights]  # once for all steps
        tapped = Tapped(count, *weights, in_float8=float8)
        del weights  # the joint one is not held for the steps
        later = torch.arange(steps, device=features.device)[:, None]
        ropes = [table.unbind() for table in self.rotary(documents.positions + later)]
        own: list[KeyValue] = []
        states = []
        for i in range(steps):
            step, taps = tapped.step()
            joint, *uses = zip(narrow, taps, strict=True)
            row = embedded[1 + i : 1 + i + count]
            q, k, v, x = self.before(
                feature, row, weight_feature, (ropes[0][i], ropes[1][i]), joint
            )
            own.append((k, v))
            attended = attend(q, own[0], own[1:], documents, self.attention).flatten(1)
            feature, normed, wide, inner = self.after(attended, feature, uses)
            if torch.is_grad_enabled():
                both = [wide] * (len(uses) - 2)  # what reads the same is one in float8
                step.inputs = [x, attended.detach(), *both, inner]
            states.append(normed)
            if self.shape.norm_output:
                feature = normed
        return states

    def embedded(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        """Return the embeddings' half [N, Q] of queries, keys and values, before rotation."""
        return F.linear(self.before.input_layernorm(embeddings.to(weight.dtype)), weight)

    def fuse(self, features: Tensor) -> Tensor:
        """Return the first feature [N, H] of captured states [N, 3H]."""
        features = features.to(self.fc.weight.dtype)
        if self.shape.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        fused: Tensor = self.fc(features)
        return fused
