"""One answer of a server as a TargetCapture, after every check that can be made of it."""

from __future__ import annotations

from typing import Any

import torch
from specforge_sglang_capture.ask import PROTOCOL, Ask
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
    count = len(ask.layers) + (ask.final != "none")
    expected: dict[str, Any] = {
        "protocol": PROTOCOL,
        "name": ask.name,
        "layers": list(ask.layers),
        "final": ask.final,
        "num_layers": info.num_layers,
        "tokens": tokens,
        "width": info.hidden_size if count else 0,
        "states": count,
        "head": list(ask.head),
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
    if frame.next_tokens is not None and not _are_tokens(frame.next_tokens, info.vocab_size):
        raise CaptureError(
            f"{where} came back with next tokens beyond the target's vocabulary of "
            f"{info.vocab_size}. Does the server run {info.name_or_path}?"
        )
    return TargetCapture(
        index=prompt.index,
        input_ids=prompt.input_ids,
        loss_mask=prompt.loss_mask,
        hidden_states=states,
        final=final,
        next_tokens=frame.next_tokens,
        logsumexp=frame.logsumexp,
    )


def _are_tokens(values: torch.Tensor, vocab_size: int) -> bool:
    return bool(((values >= 0) & (values < vocab_size)).all())
