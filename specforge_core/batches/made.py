"""What one thread makes on a GPU while another goes on there, and when it is there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from ..types import Batch


def device_of(engine: object) -> torch.device:
    """Return where an engine's captures are made, if that is in this process; else the CPU."""
    model = getattr(engine, "model", None)
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def beside(device: torch.device | None, *, inner: bool) -> AbstractContextManager[object]:
    """Have what this thread launches run beside what others launch, in a stream of its own.

    `inner` is for a thread that another one of these takes from.
    """
    if device is None or device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_stream(device, inner))


@cache
def _stream(device: torch.device, inner: bool) -> torch.cuda.Stream:
    """Return the same one every time: memory that was used in one is not used in another."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Made:
    """The point in this thread's stream up to which tensors are made."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def wait(self, tensors: Iterable[Tensor]) -> None:
        """Have the calling thread's stream wait until they are there; the host does not wait.

        Their memory is not used for anything else before that stream is done with them.
        """
        if self._event is None:
            return
        for tensor in tensors:
            if tensor.is_cuda:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self._event)
                tensor.record_stream(stream)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to the device, wherever its tensors are: states may be on the target's.

    From the host to a GPU through pinned memory, in which `pack` and `pad` put them at once.
    """
    if device.type == "cpu":
        return {name: tensor.to(device) for name, tensor in batch.items()}  # waits for a GPU's
    moved = {}
    for name, tensor in batch.items():
        far = tensor.device.type != "cpu" or tensor.is_pinned()
        moved[name] = (tensor if far else tensor.pin_memory()).to(device, non_blocking=True)
    return moved
