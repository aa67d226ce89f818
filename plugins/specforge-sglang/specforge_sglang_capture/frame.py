"""The bytes of one capture: a short JSON header, then raw tensors.

Layout: 8 bytes magic, 8 bytes header length (little endian), the header padded with spaces so
that the tensors begin at a multiple of 64 bytes, then input_ids as int64 [T], what the header's
"head" names (next_tokens as int64 [T], logsumexp as float32 [T] and zeros up to a multiple of 8
bytes), each layer [T, H] and the final state [T, H].  Both sides run on machines of the same byte
order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"SFSGCAP1"
ALIGN = 64


class FrameError(ValueError):
    """Bytes that are no whole frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One capture, or the reason there is none."""

    header: dict[str, Any]
    input_ids: Tensor | None = None  # [T] int64
    states: tuple[Tensor, ...] = ()  # [T, H] each: the layers in the order asked for, the final
    next_tokens: Tensor | None = None  # [T] int64
    logsumexp: Tensor | None = None  # [T] float32

    @property
    def error(self) -> str | None:
        value = self.header.get("error")
        return None if value is None else str(value)


def pack(
    header: dict[str, Any],
    input_ids: Tensor,
    states: Sequence[Tensor],
    next_tokens: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> list[memoryview]:
    """Return the pieces of a frame, tensors uncopied.  All are contiguous and on the CPU."""
    given = {"next_tokens": next_tokens, "logsumexp": logsumexp}
    described = {
        **header,
        "tokens": len(input_ids),
        "dtype": str(states[0].dtype).removeprefix("torch.") if states else "float32",
        "width": states[0].shape[1] if states else 0,
        "states": len(states),
        "head": [name for name, values in given.items() if values is not None],
    }
    pieces = [_head(described), _bytes(input_ids)]
    if next_tokens is not None:
        pieces.append(_bytes(next_tokens))
    if logsumexp is not None:
        pieces += [_bytes(logsumexp), memoryview(bytes(_gap(len(input_ids))))]
    return [*pieces, *map(_bytes, states)]


def _gap(tokens: int) -> int:
    """Return the zeros behind `logsumexp`."""
    return -4 * tokens % 8


def pack_error(header: dict[str, Any], error: str) -> list[memoryview]:
    """Return the pieces of a frame that says why there are no states."""
    return [_head({**header, "error": error})]


def _head(header: dict[str, Any]) -> memoryview:
    text = json.dumps(header).encode()
    text += b" " * (-(16 + len(text)) % ALIGN)
    return memoryview(MAGIC + len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _count(header: dict[str, Any], name: str) -> int:
    """Return a number of the header.  A frame without states has no width, none is empty."""
    value = header.get(name)
    if type(value) is not int or value < (name == "tokens"):
        raise FrameError(f"its header has {name} {value!r:.40}")
    return value


def unpack(buffer: Any) -> Frame:
    """Return the frame that a writable buffer begins with; its tensors share the buffer's memory.

    Raises FrameError when it does not begin with a whole one.
    """
    import torch

    view = memoryview(buffer)
    if len(view) < 16 or bytes(view[:8]) != MAGIC:
        raise FrameError("it does not begin as a capture")
    start = 16 + int.from_bytes(view[8:16], "little")
    try:
        header = json.loads(bytes(view[16:start]))
    except (ValueError, RecursionError) as exc:
        raise FrameError("its header is torn") from exc
    if not isinstance(header, dict):
        raise FrameError("its header is no object")
    if "error" in header:
        return Frame(header)
    tokens, width, count = (_count(header, name) for name in ("tokens", "width", "states"))
    dtype, head = getattr(torch, str(header.get("dtype")), None), header.get("head", [])
    if not isinstance(dtype, torch.dtype) or not isinstance(head, list) or (count and not width):
        told = {name: header.get(name) for name in ("dtype", "head", "states", "width")}
        raise FrameError(f"its header has {told!r:.200}")
    each = tokens * width * dtype.itemsize
    extra = (8 * tokens if "next_tokens" in head else 0) + (
        4 * tokens + _gap(tokens) if "logsumexp" in head else 0
    )
    if len(view) < start + 8 * tokens + extra + count * each:
        raise FrameError(f"it has {len(view)} bytes, its header promises more")

    def read(kind: torch.dtype, number: int, place: int) -> Tensor:
        return torch.frombuffer(buffer, dtype=kind, count=number, offset=place)

    ids = read(torch.int64, tokens, start)
    place = start + 8 * tokens
    nexts = sums = None
    if "next_tokens" in head:
        nexts = read(torch.int64, tokens, place)
        place += 8 * tokens
    if "logsumexp" in head:
        sums = read(torch.float32, tokens, place)
        place += 4 * tokens + _gap(tokens)
    states = [read(dtype, tokens * width, place + i * each) for i in range(count)]
    return Frame(header, ids, tuple(s.view(tokens, width) for s in states), nexts, sums)
