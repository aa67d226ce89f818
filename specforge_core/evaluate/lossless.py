"""Compare answers with what transformers' own greedy `generate` says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .decode import Answer, Limits, room, timed

# Roundings of the logits' dtype within which a deep model's two best are tied.  Measured: a
# 30-layer model in bfloat16 parts from itself at gaps of up to 2.4, in half of 64-token answers.
TIE_STEPS = 4.0


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two answers to one prompt part."""

    place: int  # in the answer
    ours: int | None  # None: this answer ended there
    expected: int | None
    gap: float  # from the target's best logit to the lesser of the two tokens'
    tie: bool  # the gap is rounding, so the target itself has no preference


@torch.inference_mode()
def reference(model: Any, prompt: Sequence[int], limits: Limits) -> Answer:
    """Answer a prompt with transformers' `generate`: greedy, no penalties, no filters."""
    start = time.perf_counter()
    eos = sorted(limits.eos)
    ids = torch.tensor([prompt], device=model.device)
    found = model.generation_config
    # the checkpoint's own generation config may hold penalties, which no option turns off
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0
    )
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(limits.max_new_tokens, room(model, prompt)),
        )
    finally:
        model.generation_config = found
    tokens = tuple(output[0, len(prompt) :].tolist())
    return Answer(tokens, timed(tokens, start))


def first_difference(
    model: Any, prompt: Sequence[int], ours: Sequence[int], expected: Sequence[int]
) -> Difference | None:
    """Return where `ours` leaves `expected`; None when they are equal.

    In float32 every difference counts.  In less precise dtypes one where the
    target's two best logits are equal to rounding is a tie.
    """
    if tuple(ours) == tuple(expected):
        return None
    shared = min(len(ours), len(expected))
    place = next((i for i in range(shared) if ours[i] != expected[i]), shared)
    if place == shared:
        end = (*ours[place : place + 1], None)[0], (*expected[place : place + 1], None)[0]
        return Difference(place, *end, gap=float("inf"), tie=False)
    logits = _logits(model, [*prompt, *ours[:place]])
    best = logits.max()
    gap = float(best - logits[[ours[place], expected[place]]].min())
    precision = torch.finfo(model.dtype).eps
    exact = model.dtype in (torch.float32, torch.float64)
    tie = not exact and gap <= TIE_STEPS * precision * float(best.abs())
    return Difference(place, ours[place], expected[place], gap, tie)


@torch.inference_mode()
def _logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits.float()
