"""One answer of a server as a TargetCapture, after every check that can be made of it."""

from __future__ import annotations

from typing import Any

import torch
from specforge_sglang_capture.ask import Ask
from specforge_sglang_capture.frame import Frame

from specforge_core.errors import CaptureError
from specforge_core.types import Prompt, TargetCapture, TargetInfo


def as_capture(
    frame: Frame, ask: Ask, prompt: Prompt, info: TargetInfo, where: str
) -> TargetCapture:
    """Return a frame as a capture, after every check that can be made of it.

    That its states are finite is checked where they were copied from, which costs less.
    """
    if frame.error is not None:
        raise CaptureError(f"{where} was not captured: {frame.error}")
    assert frame.input_ids is not None
    header, tokens = frame.header, len(prompt.input_ids)
    expected: dict[str, Any] = {
        "name": ask.name,
        "layers": list(ask.layers),
        "final": ask.final,
        "num_layers": info.num_layers,
        "tokens": tokens,
        "width": info.hidden_size,
        "states": len(ask.layers) + (ask.final != "none"),
    }
    if wrong := {key: header.get(key) for key in expected if header.get(key) != expected[key]}:
        told = ", ".join(f"{k} {v!r} instead of {expected[k]!r}" for k, v in wrong.items())
        raise CaptureError(
            f"{where} came back wrong: {told}. Does the server run {info.name_or_path}?"
        )
    if not torch.equal(frame.input_ids, prompt.input_ids.to(torch.int64)):
        raise CaptureError(f"{where} came back with other tokens than were sent")
    states = dict(zip(ask.layers, frame.states, strict=False))
    final = frame.states[-1] if ask.final != "none" else None
    return TargetCapture(prompt.index, prompt.input_ids, prompt.loss_mask, states, final)
