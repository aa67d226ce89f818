"""Where SGLang's model keeps what is hooked, and what a batch holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NORMS = ("norm", "final_layernorm", "ln_f", "norm_f", "final_norm")


class Refusal(Exception):
    """Why a request's states cannot be given."""


def find_decoder(
    model: nn.Module, num_layers: int
) -> tuple[nn.ModuleList | None, nn.Module | None]:
    """Return the decoder layers and the final norm; None where they are not found."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        norm = next((getattr(module, n) for n in NORMS if hasattr(module, n)), None)
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers and norm is not None:
            return layers, norm
    return None, None


def find_logits_processor(model: nn.Module) -> nn.Module:
    """Return the module that every model hands its last states to."""
    for module in model.modules():
        if type(module).__name__ == "LogitsProcessor":
            return module
    raise Refusal(f"{type(model).__name__} has no LogitsProcessor")


def states_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that may be hidden states, [N, H]."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return [t for t in tensors if t.ndim == 2 and t.is_floating_point()]


def prompt_lengths(batch: Any, input_ids: Tensor) -> list[int]:
    """Return the tokens of each request in the batch; Refusal when it holds parts of prompts."""
    lengths = [int(n) for n in batch.extend_seq_lens_cpu]
    cached = [int(n) for n in batch.extend_prefix_lens_cpu]
    if any(cached):
        raise Refusal(
            f"{max(cached)} tokens of a prompt were not run: they came from the radix cache or "
            "an earlier chunk. Start SGLang with --disable-radix-cache --chunked-prefill-size -1"
        )
    if sum(lengths) != len(input_ids):
        raise Refusal(f"the batch holds {len(input_ids)} tokens for prompts of {sum(lengths)}")
    return lengths


def finite_advice(dtype: torch.dtype) -> str:
    """Return what to try where states of `dtype` are not finite."""
    if dtype in (torch.float16, torch.bfloat16):
        return "Try: target.dtype=float32"
    return (
        "No dtype is wider: the target's weights, or what it was given, are bad. "
        "Try another target.revision or target.path"
    )
