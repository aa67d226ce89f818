"""The head of a draft, over a vocabulary of its own, and the losses of what it gives.

Shapes: H hidden size, R steps, U labels, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specforge_core.float8 import by_rows, fits
from specforge_core.nn.decoder import init_weights
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.nn.rotary import Rotary
from specforge_core.nn.soft_loss import SoftLoss
from specforge_core.target.head import widen
from specforge_core.types import Batch

from .config import DraftShape, VocabularyOptions
from .vocab import members, target_tokens


class Teacher:
    """What rows of a batch are to draft, R of them for each of the U labels.

    No dataclass: FSDP's mixed precision casts the tensors in those.
    """

    def __init__(self, batch: Batch, teacher_head: Tensor, loss: SoftLoss) -> None:
        self.row_weights = batch["row_weights"]  # [U, R]
        self.final, self.logsumexp = batch["final"], batch["logsumexp"]  # [U, H], [U]
        self.teacher_head = teacher_head  # [Vd, H], or wider with a bias
        self.loss = loss


class DraftHead(nn.Linear):
    """The head; in training the losses of its logits, which never exist as a whole.

    As a unit of its own it is gathered while the layers run.  Its gradient is whole as soon as the
    backward pass begins, so it is reduced while theirs are computed.
    """

    def __init__(self, shape: DraftShape, config: VocabularyOptions) -> None:
        super().__init__(shape.hidden_size, shape.draft_vocab_size, bias=False)
        self.chunk, self.softcap = config.head_chunk, shape.softcap

    def forward(
        self, input: Tensor, teacher: Teacher | None = None, *, float8: bool = False
    ) -> Any:
        """Return logits [..., Vd] of states [..., H].

        With a teacher: the weighted sum of the losses of states [U, R, H], and each label's rows,
        by logits in `float8` if the head's sizes are multiples of 16.
        """
        if teacher is None:
            return super().forward(input)
        narrow = float8 and fits(self.weight)
        return linear_soft_cross_entropy(
            input,
            self.weight,
            widen(teacher.final, teacher.teacher_head.shape[1]),
            teacher.teacher_head,
            teacher.row_weights,
            teacher.loss,
            teacher_softcap=self.softcap,
            teacher_logsumexp=teacher.logsumexp,
            chunk=self.chunk,
            float8=by_rows(self.weight.detach()) if narrow else None,
        )


class VocabularyModel(nn.Module):
    """Base of a trained part that reads captured states by `fc`, with a head for a vocabulary."""

    lm_head: DraftHead
    d2t: Tensor  # [Vd] int64, offsets
    t2d: Tensor  # [V] bool

    def __init__(self, shape: DraftShape, config: VocabularyOptions) -> None:
        super().__init__()
        self.shape = shape
        self.attention = config.attention
        self.rotary = Rotary(shape.rope, shape.head_dim, shape.max_positions)
        captured = len(shape.capture_layers) * shape.hidden_size
        self.fc = nn.Linear(captured, shape.hidden_size, bias=False)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(shape.vocab_size, dtype=torch.bool))

    def start(
        self, config: VocabularyOptions, load_head: Callable[[], Tensor], d2t: Tensor | None
    ) -> None:
        """Give a model that is on "meta" its first weights, on the CPU, alike on every rank.

        The head is the target's, its rows of the vocabulary `d2t` [Vd]; that is None where
        weights, and the vocabulary with them, are about to be loaded.
        """
        self.to_empty(device="cpu")
        but = None if d2t is None else self.lm_head
        init_weights(self, self.shape.init_std, config.seed, but=but)
        nn.init.zeros_(self.d2t)
        nn.init.ones_(self.t2d)
        if d2t is not None:
            self.d2t.copy_(d2t)
            self.t2d.copy_(members(d2t, self.shape.vocab_size))
            with torch.no_grad():
                rows = load_head()[target_tokens(d2t)]
                self.lm_head.weight.copy_(rows[:, : self.shape.hidden_size])
        self.lm_head.requires_grad_(config.train_head)
