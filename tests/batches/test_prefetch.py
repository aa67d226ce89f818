from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from specforge_core import stop
from specforge_core.batches.prefetch import Prefetcher
from specforge_core.data.order import epoch_order


def test_items_come_in_order_and_end() -> None:
    items = Prefetcher(iter(range(50)), 3)
    assert list(items) == list(range(50))
    assert list(items) == []


def test_an_error_arrives_where_its_item_would() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("bad sample")

    items = Prefetcher(broken(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="bad sample"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_no_more_than_depth_items_are_made_ahead_and_close_ends_the_thread() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    items = Prefetcher(source(), 4)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 1 + 4 + 1  # taken, waiting, in the thread's hand
    items.close()
    assert not items._thread.is_alive()


def test_a_stop_ends_the_wait_for_an_item_but_takes_one_that_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, more = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        asked.set()
        more.wait()
        yield 2

    items = Prefetcher(source(), 1)
    assert asked.wait(20)  # for the second one, so the first is ready
    monkeypatch.setattr(stop, "asked", lambda: signal.SIGTERM)
    assert next(items) == 1
    with pytest.raises(stop.Interrupted, match="stopped by SIGTERM"):
        next(items)
    start = time.monotonic()
    items.close(0.2)  # the thread still waits
    assert time.monotonic() - start < 5
    more.set()
    items.close()


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    first, second = epoch_order(100, 3, 0), epoch_order(100, 3, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first == epoch_order(100, 3, 0)
    assert first != epoch_order(100, 4, 0)


def test_an_inner_one_gives_its_item_also_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that a validation waits for: the run is saved, and ends, once it is measured."""
    more = threading.Event()

    def source() -> Iterator[int]:
        more.wait(10)
        yield 1

    items = Prefetcher(source(), 0, inner=True)
    monkeypatch.setattr(stop, "asked", lambda: signal.SIGTERM)
    threading.Timer(0.3, more.set).start()
    assert next(items) == 1
    items.close()
