"""What a draft's distribution is compared with its teacher's by, and what comes out.

Shapes: U teacher rows, R student rows of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Objective: TypeAlias = Literal["cross_entropy", "log_overlap", "hybrid"]


@dataclass(frozen=True, slots=True)
class SoftLoss:
    """What is minimised for a student distribution q against its teacher.

    The student knows a part of the teacher's vocabulary.  There p is the teacher's softmax over
    that part alone, and m <= 1 is the probability that the teacher gives to that part (1 where
    it is not told).  A token drawn from q is accepted with probability a = sum_v min(m p_v, q_v):
    what the teacher gives to other tokens is accepted nowhere.
        cross_entropy   -sum_v p_v log q_v
        log_overlap     -log a; nothing where a is 0
        hybrid          w KL(p || q) + (1 - w) (1 - a), w = scale * exp(-decay * a), w constant
    """

    objective: Objective = "cross_entropy"
    scale: float = 1.0
    decay: float = 3.0


@dataclass(frozen=True, slots=True)
class SoftRows:
    """What each student row came to, without gradients; all [U, R]."""

    losses: Tensor  # before weighting
    overlaps: Tensor  # a
    best: Tensor  # int64, the student's most likely token


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are made in."""
    return torch.promote_types(dtype, torch.float32)
