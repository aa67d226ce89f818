"""The target's head: from its normed final state to logits.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CaptureError
from ..types import TargetInfo
from .measure import HeadScale, measure_head
from .skeleton import skeleton
from .weights import load_head_bias, load_target_tensors

ROWS, GPU_ROWS = 512, 2048  # whose logits exist at a time
EXTRA = 8  # columns that a bias takes: one, and zeros to keep rows aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head's parts.

    z = scale * (state @ weight.T + bias); with a softcap the logits are
    softcap * tanh(z / softcap).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of_model(cls, model: Any, info: TargetInfo) -> Head:
        """Return the head of a loaded model, without rows that only pad its vocabulary."""
        module = model.get_output_embeddings()
        if module is None:
            raise CaptureError(
                f"{type(model).__name__} has no language model head. Choose another target.path"
            )
        return cls._of(module.weight, getattr(module, "bias", None), info)

    @classmethod
    def load(cls, info: TargetInfo) -> Head:
        """Read the head from the target's files, on the CPU, without padding rows."""
        weight = load_target_tensors(info, ("lm_head",))["lm_head"]
        return cls._of(weight, load_head_bias(info), info)

    @classmethod
    def _of(cls, weight: Tensor, bias: Tensor | None, info: TargetInfo) -> Head:
        beside = head_scale(info)
        return cls(
            weight=weight[: info.vocab_size],
            bias=None if bias is None else bias[: info.vocab_size],
            scale=beside.scale,
            softcap=beside.softcap,
        )

    def logits(self, states: Tensor) -> Tensor:
        """Return [..., V] float32 (float64 for float64) for normed final states [..., H]."""
        return self._given(self._product(states))

    def _product(self, states: Tensor) -> Tensor:
        """Return [..., V] in the weight's dtype."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(states.to(self.weight.dtype), self.weight, bias)

    def _given(self, product: Tensor) -> Tensor:
        out = product.to(_wide(product))
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def joined(self) -> Tensor:
        """Return one matrix [V, W] whose product with `widen(state, W)` is scale * (... + bias).

        W is H, or with a bias a little more: for losses that know of no bias.
        """
        if self.bias is None:
            joined = self.weight
        else:
            column = self.bias.to(self.weight.dtype)[:, None]
            joined = F.pad(torch.cat([self.weight, column], dim=1), (0, EXTRA - 1))
        return joined if self.scale == 1.0 else joined * self.scale

    def summarize(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token [T] int64 and the logits' log-sum-exp [T] float32."""
        tokens, sums = [], []
        for rows in torch.split(states, GPU_ROWS if states.is_cuda else ROWS):
            token, total = self._summary(self._product(rows))
            tokens.append(token)
            sums.append(total)
        return torch.cat(tokens), torch.cat(sums)

    def _summary(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.is_cuda and logits.dtype != torch.float64:
            from .triton_head import summarize_logits

            return summarize_logits(logits, self.scale, self.softcap)
        if self.scale != 1.0 or self.softcap is not None:
            logits = self._given(logits)
        token = logits.argmax(dim=-1, keepdim=True)
        # z - log_softmax(z): one kernel reads and widens what takes logsumexp five
        below = F.log_softmax(logits, dim=-1, dtype=_wide(logits)).gather(-1, token)
        return token[..., 0], (logits.gather(-1, token) - below)[..., 0].float()


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def widen(states: Tensor, width: int) -> Tensor:
    """Return states [..., H] as a matrix of `Head.joined` wants them: with a 1 for its bias."""
    more = width - states.shape[-1]
    if more == 0:
        return states
    one = states.new_ones(*states.shape[:-1], 1)
    return F.pad(torch.cat([states, one], dim=-1), (0, more - 1))


def head_scale(info: TargetInfo) -> HeadScale:
    """Return what a target does to its logits; by its config where its code cannot be asked."""
    model = skeleton(info)
    found = None if model is None else measure_head(model, info.hidden_size)
    return found or _said(info.config)


def _said(config: Mapping[str, Any]) -> HeadScale:
    cap = config.get("final_logit_softcapping") or config.get("logits_soft_cap")
    scale = 1.0
    if config.get("logits_scaling") is not None:  # Granite divides
        scale = 1.0 / float(config["logits_scaling"])
    for key in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if config.get(key) is not None:
            scale = float(config[key])
    return HeadScale(scale=scale, softcap=float(cap) if cap else None)
