"""Samples to one batch: behind each other, or below each other with padding.

Shapes: T tokens of a sample, B samples, S the longest of them or the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..capture.layout import is_ragged
from ..types import DOCUMENT_IDS, POSITION_IDS, Batch, CaptureSpec, Sample


def token_fields(spec: CaptureSpec) -> frozenset[str]:
    """Return the fields of a stored sample that have a token axis."""
    return frozenset(name for name, field in spec.fields.items() if is_ragged(field))


def pack(samples: Sequence[Sample], ragged: Collection[str]) -> Batch:
    """Put samples behind each other in one row [1, sum of T].

    Fields not in `ragged`, those with a token axis, are stacked by document: [B, ...].
    """
    lengths = [_length(sample, ragged) for sample in samples]
    numbers = torch.arange(1, len(samples) + 1)
    batch = {
        name: torch.cat([s[name] for s in samples])[None]
        if name in ragged
        else torch.stack([s[name] for s in samples])
        for name in samples[0]
    }
    return batch | {
        DOCUMENT_IDS: numbers.repeat_interleave(torch.tensor(lengths))[None],
        POSITION_IDS: torch.cat([torch.arange(length) for length in lengths])[None],
    }


def pad(samples: Sequence[Sample], ragged: Collection[str]) -> Batch:
    """Put one sample in each row [B, longest]; padding is zero and in no document."""
    lengths = torch.tensor([_length(sample, ragged) for sample in samples])
    batch = {
        name: pad_sequence([s[name] for s in samples], batch_first=True)
        if name in ragged
        else torch.stack([s[name] for s in samples])
        for name in samples[0]
    }
    places = torch.arange(int(lengths.max()))
    inside = places < lengths[:, None]
    numbers = torch.arange(1, len(samples) + 1)[:, None]
    return batch | {DOCUMENT_IDS: numbers * inside, POSITION_IDS: places * inside}


def truncate(sample: Sample, ragged: Collection[str], max_length: int) -> Sample:
    """Keep the first `max_length` tokens of every field that has a token axis."""
    return {name: x[:max_length] if name in ragged else x for name, x in sample.items()}


def _length(sample: Sample, ragged: Collection[str]) -> int:
    return next((len(tensor) for name, tensor in sample.items() if name in ragged), 1)


def num_tokens(sample: Sample, spec: CaptureSpec) -> int:
    """Return a sample's tokens, whatever order its fields are in."""
    return _length(sample, token_fields(spec))


def flat_rows(batch: Batch, names: Collection[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Return fields [N, ...] without the padding, and the documents [N] they are of."""
    documents = batch[DOCUMENT_IDS].flatten()
    kept = documents.nonzero().squeeze(1)
    whole = len(kept) == len(documents)
    flat = {}
    for name in names:
        values = batch[name].flatten(0, 1)
        flat[name] = values if whole else values[kept.to(values.device)]
    return flat, documents[kept]
