"""Frames carry every bit of a state, and a damaged one is never read."""

from __future__ import annotations

import json

import pytest
import torch
from specforge_sglang_capture.frame import FrameError, pack, pack_error, unpack
from torch import Tensor


def joined(pieces: list[memoryview]) -> bytearray:
    return bytearray(b"".join(pieces))


def example(dtype: torch.dtype, tokens: int = 5) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(tokens, 12, generator=draw).to(dtype) for _ in range(3)]
    return torch.arange(tokens) * 1000, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_bit_comes_back(dtype: torch.dtype, tokens: int) -> None:
    ids, states = example(dtype, tokens)
    frame = unpack(joined(pack({"name": "7"}, ids, states)))
    assert frame.error is None
    assert frame.input_ids is not None
    assert torch.equal(frame.input_ids, ids)
    assert len(frame.states) == 3
    for found, sent in zip(frame.states, states, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, sent)
    told = {key: frame.header[key] for key in ("name", "tokens", "width", "states")}
    assert told == {"name": "7", "tokens": tokens, "width": 12, "states": 3}


def test_tensors_are_not_copied() -> None:
    ids, states = example(torch.float32)
    pieces = pack({}, ids, states)
    states[0][0, 0] = 42
    buffer = joined(pieces)
    frame = unpack(buffer)
    assert frame.states[0][0, 0] == 42
    frame.states[0][0, 0] = 43
    assert unpack(buffer).states[0][0, 0] == 43


def test_an_error_is_a_frame_too() -> None:
    frame = unpack(joined(pack_error({"name": "7"}, "no such layer")))
    assert (frame.error, frame.header["name"]) == ("no such layer", "7")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "promises more"),
        (lambda raw: raw[:40], "header is torn"),
        (lambda raw: b"X" + raw[1:], "does not begin as a capture"),
        (lambda raw: b"", "does not begin as a capture"),
        (lambda raw: raw[:8] + (100_000).to_bytes(8, "little") + b"[" * 100_000, "header is torn"),
    ],
)
def test_damage_is_noticed(damage: object, message: str) -> None:
    ids, states = example(torch.bfloat16)
    assert callable(damage)
    with pytest.raises(FrameError, match=message):
        unpack(bytearray(damage(bytes(joined(pack({}, ids, states))))))


@pytest.mark.parametrize(
    "change",
    [
        *({"tokens": value} for value in (None, "5", -1, 0, 5.0, True, 10**30, [5])),
        *({"width": value} for value in (None, "5", -1, 0, 10**30)),
        *({"states": value} for value in (None, -1, 10**30)),
        *({"dtype": value} for value in (None, 5, "nn", "Q99", "__name__", "a\0")),
        *({"head": value} for value in (None, 5, "next_tokens")),
        *([], [5], None, 5, "x"),
    ],
)
def test_a_header_that_nobody_packed_is_noticed(change: object) -> None:
    raw = bytes(joined(pack({}, *example(torch.bfloat16))))
    size = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16 : 16 + size])
    text = json.dumps(header | change if isinstance(change, dict) else change).encode()
    with pytest.raises(FrameError):
        unpack(bytearray(raw[:8] + len(text).to_bytes(8, "little") + text + raw[16 + size :]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("given", [("next_tokens",), ("logsumexp",), ("next_tokens", "logsumexp")])
def test_what_the_head_made_comes_back(
    dtype: torch.dtype, tokens: int, given: tuple[str, ...]
) -> None:
    ids, states = example(dtype, tokens)
    head = {"next_tokens": torch.arange(tokens) + 7, "logsumexp": torch.arange(tokens) / 3}
    sent = {name: head[name] for name in given}
    raw = joined(pack({}, ids, states, **sent))
    frame = unpack(raw)
    assert frame.header["head"] == list(given)
    for name, values in {"next_tokens": frame.next_tokens, "logsumexp": frame.logsumexp}.items():
        assert (values is not None) == (name in given)
        assert values is None or torch.equal(values, head[name])
    assert all(torch.equal(a, b) for a, b in zip(frame.states, states, strict=True))
    with pytest.raises(FrameError, match="promises more"):
        unpack(raw[:-1])
