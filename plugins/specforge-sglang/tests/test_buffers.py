"""Memory comes back when its last user is gone, and not before."""

from __future__ import annotations

import torch
from specforge_sglang.buffers import Buffers


def test_memory_is_used_again_once_nothing_shares_it() -> None:
    buffers = Buffers(1000)
    first = buffers.take(100)
    place = first.ctypes.data
    tensor = torch.frombuffer(first, dtype=torch.uint8)[10:20]
    tensor.fill_(7)
    del first
    second = buffers.take(100)
    assert second.ctypes.data != place
    second.fill(0)
    assert tensor.tolist() == [7] * 10
    del tensor
    third = buffers.take(60)
    assert (third.ctypes.data, len(third)) == (place, 60)


def test_what_is_too_small_is_replaced_and_no_more_is_kept_than_allowed() -> None:
    buffers = Buffers(150)
    buffers.take(50)
    assert len(buffers.take(100)) == 100  # the 50 are gone, and these 100 are back
    one, other = buffers.take(100), buffers.take(100)
    del one
    del other
    assert [len(whole) for whole in buffers._free] == [100]
