"""What one sample must look like: names, dtypes and shapes, as the spec promises."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..types import CaptureSpec, Field, Problem, Sample


def is_ragged(field: Field) -> bool:
    """Say whether a field has a token axis."""
    return field.shape[:1] == (None,)


def of_field(name: str, message: str) -> Problem:
    """Return what is wrong with one field of a sample."""
    return Problem(where=f"field {name!r}", message=message)


def num_tokens(fields: Mapping[str, Field], sample: Sample) -> int:
    """Return a sample's length in tokens; 1 when none of its fields has a token axis."""
    return next((len(x) for n, x in sample.items() if n in fields and is_ragged(fields[n])), 1)


def layout_problems(fields: Mapping[str, Field], sample: Sample) -> list[Problem]:
    """Compare a sample's names, dtypes and shapes with what the spec promises."""
    lost = "is not in the sample. Return it from the strategy's adapter"
    more = "is not in the capture spec. Declare it in CaptureSpec.fields"
    problems = [of_field(name, lost) for name in fields.keys() - sample.keys()]
    problems += [of_field(name, more) for name in sample.keys() - fields.keys()]
    lengths = {}
    for name in fields.keys() & sample.keys():
        field, tensor = fields[name], sample[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != field.dtype:
            told = f"is {dtype}, the spec says {field.dtype}. Cast it in the strategy's adapter"
            problems.append(of_field(name, told))
        fits = tensor.ndim == len(field.shape) and all(
            want in (None, have) for want, have in zip(field.shape, tensor.shape, strict=True)
        )
        if not fits:
            want = [n if n is not None else "tokens" for n in field.shape]
            told = f"has shape {list(tensor.shape)}, the spec says {want}"
            problems.append(of_field(name, told))
        elif is_ragged(field):
            lengths[name] = len(tensor)
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} {length}" for name, length in sorted(lengths.items()))
        problems.append(
            Problem(where="sample", message=f"fields differ in their number of tokens: {listing}")
        )
    return sorted(problems, key=str)


def non_finite(sample: Sample) -> list[str]:
    """Return the fields that hold a NaN or an infinity."""
    floating = {name: tensor for name, tensor in sample.items() if tensor.is_floating_point()}
    # the sum needs no memory; only an overflow makes it wrong, which the exact test settles
    return [
        name
        for name, tensor in sorted(floating.items())
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all()
    ]


def check_sample(spec: CaptureSpec, vocab_size: int, sample: Sample) -> list[Problem]:
    """Return what is wrong with a sample, whatever the strategy.

    Looks at names, shapes, dtypes, token counts and finiteness, at the range of
    `input_ids`, and that `loss_mask` is 0 or 1.
    """
    problems = layout_problems(spec.fields, sample)
    problems += [of_field(name, "holds NaN or infinity") for name in non_finite(sample)]
    for name, most in (("input_ids", vocab_size - 1), ("loss_mask", 1)):
        values = sample.get(name)
        if values is None or not values.numel():
            continue
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > most:
            told = f"has values {low} to {high}, allowed are 0 to {most}"
            problems.append(of_field(name, told))
    return problems
