"""Copies states to the host while the model goes on with its next batch.

The tensors of a request are first laid side by side on the device, in the model's own stream: what
SGLang does with them afterwards does not matter.  From there they are copied to pinned memory in
a stream of their own, and an event says when they are there.  SGLang 0.5.20 and newer has such
copies for results that it sends on itself (`auxiliary_device_output`); these work in every version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP_BYTES = 1 << 26  # of one copy: pinned memory is kept by size, so most copies have this one
ALIGN = 64


@dataclass(frozen=True, slots=True)
class Pending:
    """The tensors of one request, on their way to the host."""

    group: Tensor  # on the host, uint8 [bytes]
    places: tuple[tuple[int, torch.dtype, torch.Size], ...]
    event: Any  # None when they are there already

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(shape.numel() * dtype.itemsize for _, dtype, shape in self.places)

    def wait(self) -> list[Tensor]:
        """Return the tensors once they are there: contiguous, and on the CPU."""
        if self.event is not None:
            with torch.cuda.device(self.event.device):  # else a thread wakes up device 0
                self.event.synchronize()
        return [_at(self.group, *place) for place in self.places]


class Copier:
    """Begins copies; it never waits for one, nor for the model."""

    def __init__(self) -> None:
        self._stream: Any = None

    def begin(self, requests: Sequence[Sequence[Tensor]]) -> list[Pending]:
        """Return what becomes of each request's tensors.  All are on one device.

        The tensors may be changed or freed as soon as this returns, in the current stream.
        """
        return [pending for group in _groups(requests) for pending in self._copy(group)]

    def _copy(self, requests: Sequence[Sequence[Tensor]]) -> list[Pending]:
        total = sum(map(_room, requests))
        laid = torch.empty(total, dtype=torch.uint8, device=requests[0][0].device)
        start, placed = 0, []
        for tensors in requests:
            places = []
            for tensor in tensors:
                places.append((start, tensor.dtype, tensor.shape))
                _at(laid, *places[-1]).copy_(tensor)
                start += _padded(tensor)
            placed.append(tuple(places))
        host, event = self._to_host(laid)
        return [Pending(host, places, event) for places in placed]

    def _to_host(self, laid: Tensor) -> tuple[Tensor, Any]:
        if laid.device.type != "cuda":
            return laid.cpu(), None
        if self._stream is None:
            self._stream = torch.cuda.Stream(laid.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(laid.device))
        size = max(len(laid), GROUP_BYTES)
        host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)[: len(laid)]
        with torch.cuda.stream(self._stream):
            host.copy_(laid, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        laid.record_stream(self._stream)  # its memory is not given to others before the copy
        return host, event


def _groups(requests: Sequence[Sequence[Tensor]]) -> Iterator[Sequence[Sequence[Tensor]]]:
    """Split requests into groups of at most GROUP_BYTES, or of one request."""
    begin = size = 0
    for i, tensors in enumerate(requests):
        room = _room(tensors)
        if i > begin and size + room > GROUP_BYTES:
            yield requests[begin:i]
            begin, size = i, 0
        size += room
    if requests:
        yield requests[begin:]


def _room(tensors: Sequence[Tensor]) -> int:
    return sum(map(_padded, tensors))


def _padded(tensor: Tensor) -> int:
    return tensor.nbytes + -tensor.nbytes % ALIGN


def _at(group: Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    raw = group[start : start + shape.numel() * dtype.itemsize]
    return raw.view(dtype).view(shape)
