"""What one thread makes on a GPU while another goes on there, and when it is there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def here() -> torch.device:
    """Return the GPU that this thread works on, or the CPU where no GPU is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def beside(device: torch.device | None) -> AbstractContextManager[object]:
    """Have what this thread launches run beside what others launch, in a stream of its own."""
    if device is None or device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


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
