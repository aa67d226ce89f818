"""Which device a part of a run computes on."""

from __future__ import annotations

import os

import torch

from .errors import ConfigError
from .text import cut, shorten


def pick_device(name: str, option: str) -> torch.device:
    """Return the device called `name`; `auto` is this rank's GPU, or the CPU.

    Raises ConfigError naming the `option` it was given for when there is no such device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()  # the meta device exists, and computes nothing
    except Exception as exc:  # each kind of device raises its own
        reason = cut((str(exc).splitlines() or [type(exc).__name__])[0], 300)
        raise ConfigError(
            f"{option} {shorten(name)} cannot be used: {reason}. Try: {option}=auto"
        ) from exc
    return device
