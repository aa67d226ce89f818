"""Samples to one batch: behind each other, or below each other with padding.

Shapes: T tokens of a sample, B samples, S the longest of them or the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..capture.layout import is_ragged
from ..types import DOCUMENT_IDS, POSITION_IDS, Batch, CaptureSpec, Sample

_PIN: ContextVar[bool] = ContextVar("pinned", default=False)


@contextmanager
def pinned(wanted: bool) -> Iterator[None]:
    """Have `pack` and `pad` write a batch into pinned memory, from where a GPU copies it."""
    token = _PIN.set(wanted)
    try:
        yield
    finally:
        _PIN.reset(token)


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
        name: _joined([s[name] for s in samples])[None]
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
        name: _padded([s[name] for s in samples])
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


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if not _alike(parts):
        return torch.cat(list(parts))  # as torch joins them, or says why not
    out = _empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0])
    return torch.cat(list(parts), out=out)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    if not _alike(parts):
        return pad_sequence(list(parts), batch_first=True)
    out = _empty((len(parts), max(map(len, parts)), *parts[0].shape[1:]), parts[0])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
        row[len(part) :] = 0
    return out


def _alike(parts: Sequence[Tensor]) -> bool:
    return len({(part.dtype, part.shape[1:]) for part in parts}) == 1


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    pin = _PIN.get() and like.device.type == "cpu"
    return torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=pin)


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
