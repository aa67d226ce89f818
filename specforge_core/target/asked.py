"""What may be asked of a target, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import CaptureError
from ..types import GenerateOptions, Prompt, TargetInfo


def check_layers(layers: Iterable[int], num_layers: int) -> None:
    """Raise CaptureError for layers that the target does not have."""
    last = num_layers - 1
    if wrong := sorted(i for i in layers if not -1 <= i <= last):
        raise CaptureError(
            f"layers {wrong} are not in the target: it has layers 0 to {last}, and -1 is the "
            "embedding output. Change the strategy's layers"
        )


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Raise CaptureError for token ids that the target does not have."""
    for prompt in prompts:
        low, high = int(prompt.input_ids.min()), int(prompt.input_ids.max())
        if low < 0 or high >= vocab_size:
            raise CaptureError(
                f"prompt {prompt.index} has token ids {low} to {high}, the target's vocabulary "
                f"is 0 to {vocab_size - 1}. Use the target's own tokenizer"
            )


def finite_advice(dtype: torch.dtype) -> str:
    """Return what to try where values of `dtype` are not finite."""
    if dtype in (torch.float16, torch.bfloat16):
        return "Try: target.dtype=float32"
    return (
        "No dtype is wider: the target's weights, or what it was given, are bad. Try another "
        "target.revision or target.path; for captures there are: specforge verify CAPTURE_DIR"
    )


def max_positions(info: TargetInfo) -> int | None:
    """Return the tokens that prompt and answer may have together, where the target has a limit."""
    found = info.config.get("max_position_embeddings")
    return int(found) if found else None


def answer_room(info: TargetInfo, length: int, options: GenerateOptions) -> int:
    """Return how many tokens may be written after a prompt of `length` tokens.

    Raises CaptureError where there is no room for one.
    """
    limit = max_positions(info)
    if limit is None:
        return options.max_new_tokens
    if length >= limit:
        raise CaptureError(
            f"a prompt of {length} tokens leaves no room for an answer: the target takes {limit}. "
            f"Try: data.max_length={limit}"
        )
    return min(options.max_new_tokens, limit - length)
