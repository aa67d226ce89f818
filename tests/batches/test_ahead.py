"""While the samples of a window are used, the next one is captured, and no more than that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch

from specforge_core.batches.made import Made
from specforge_core.batches.prefetch import Prefetcher
from specforge_core.errors import CaptureError
from specforge_core.types import CaptureSpec, Prompt, TargetCapture

from .sources import ALONE, Echo, online


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_one_window_ahead() -> None:
    engine = Echo()
    samples = online(ALONE, engine, count=40).samples(0)
    next(samples)
    assert until(lambda: len(engine.asked) == 2)
    list(islice(samples, 3))  # the first window's last one
    time.sleep(0.1)
    assert len(engine.asked) == 2
    next(samples)
    assert until(lambda: len(engine.asked) == 3)


def test_nothing_is_captured_beyond_the_end() -> None:
    engine = Echo()
    samples = online(ALONE, engine, count=40).samples(0, 6)
    assert len(list(islice(samples, 6))) == 6
    time.sleep(0.1)
    assert [len(window) for window in engine.asked] == [4, 2]
    next(samples)  # but for who asks: a sample may have to stand in
    assert len(engine.asked) == 3


def test_a_source_that_is_closed_ends_in_the_middle_of_a_window() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Echo):
        def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
            for number, capture in enumerate(super().capture(prompts, spec)):
                if len(self.asked) == 2 and number == 1:
                    begun.set()
                    assert go_on.wait(10)
                yield capture

    before = set(threading.enumerate())
    engine = Slow()
    source = online(ALONE, engine, count=40)
    batches = Prefetcher(source.samples(0), 2)
    next(batches)
    assert begun.wait(10)
    source.close()
    go_on.set()
    batches.close(10)
    assert engine.busy  # the window was not captured to its end
    left = set(threading.enumerate()) - before  # a test before may have left some of its own
    assert not any(thread.name == "specforge-prefetch" for thread in left)


def test_what_fails_ahead_is_told_when_its_sample_is_due() -> None:
    class Broken(Echo):
        def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
            if self.asked:
                raise CaptureError("the second window cannot be captured")
            return super().capture(prompts, spec)

    samples = online(ALONE, Broken(), count=40).samples(0)
    assert len(list(islice(samples, 4))) == 4
    with pytest.raises(CaptureError, match="the second window"):
        next(samples)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_another_thread_makes_on_a_gpu_is_waited_for_there() -> None:
    """The host is not held up, and memory is not given away before it was read."""
    device = torch.device("cuda", torch.cuda.current_device())

    def source() -> Iterator[tuple[torch.Tensor, Made]]:
        for number in range(20):
            torch.cuda._sleep(20_000_000)  # about 10 ms, before what follows
            yield torch.full((1 << 20,), number, device=device), Made(device)

    sums = []
    for tensor, made in Prefetcher(source(), 2, device):
        made.wait([tensor])
        torch.cuda._sleep(1_000_000)
        sums.append(tensor.sum())
        del tensor
    assert [int(total) for total in sums] == [number << 20 for number in range(20)]
