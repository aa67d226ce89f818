"""Samples at the edges of what is trained: short, cut, and with little or nothing supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..types import Sample, StepOutput, TargetCapture
from .case import Case

LENGTHS = (1, 2, 3, 4, 8)  # tokens that samples are cut to: a block's, and fewer
# places that are supervised, by name; a negative one counts from the end
ANSWERS = {
    "an answer of one token, inside": [4],
    "an answer of one token, the last": [-1],
    "an answer of two tokens, inside": [4, 5],
    "an answer of two tokens, the last": [-2, -1],
    "answers of one token and of two": [2, 4, 5, 7],
}


def edge_samples(case: Case) -> dict[str, Sample]:
    """Return samples of one text by name: those that the strategy does not turn down."""
    capture = max(case.captures, key=lambda one: len(one.input_ids))
    whole = replace(capture, loss_mask=torch.ones_like(capture.loss_mask))
    found = {f"cut to {n} tokens": case.sample(whole, max_length=n) for n in LENGTHS}
    found["every token"] = case.sample(whole)
    for name, places in ANSWERS.items():
        mask = torch.zeros_like(capture.loss_mask)
        mask[places] = 1
        found[name] = case.sample(replace(capture, loss_mask=mask))
    return {name: sample for name, sample in found.items() if sample is not None}


def silenced(case: Case, capture: TargetCapture) -> Sample | None:
    """Return a sample in which nothing is supervised; None where the strategy makes none.

    Where the strategy turns it down as a sample, the mask is cleared behind the transform.  That
    silences nothing where labels were read from it before: such a strategy never has one either.
    """
    nothing = torch.zeros_like(capture.loss_mask)
    if (sample := case.sample(replace(capture, loss_mask=nothing))) is not None:
        return sample
    taught = case.sample(capture)
    if taught is None or "loss_mask" not in taught:
        return None
    sample = {**taught, "loss_mask": torch.zeros_like(taught["loss_mask"])}
    with torch.no_grad():
        heard = torch.equal(case.step([sample]).loss_sum, case.step([taught]).loss_sum)
    return None if heard else sample


def stepped(
    case: Case, samples: Sequence[Sample], what: str
) -> tuple[StepOutput, dict[str, Tensor]]:
    """Return what a step on samples comes to, and the gradient of every trained parameter.

    Raises AssertionError where a number is not finite, or a parameter has no gradient: under
    FSDP the other ranks wait for it.
    """
    model = case.draft.model
    model.zero_grad()
    output = case.step(samples)
    torch.autograd.backward(output.loss_sum)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert not without, f"{what}: no gradient, which other ranks would wait for"
    gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    numbers = {"loss_sum": output.loss_sum, "weight": output.weight, **gradients}
    numbers |= {f"metric {name}": ratio.num for name, ratio in output.metrics.items()}
    assert not [name for name, value in numbers.items() if not value.isfinite().all()], what
    return output, gradients
