"""The samples of a capture, read by threads before they are asked for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ..data.order import Order
from ..data.stream import Closed
from ..errors import DataError
from ..progress import console
from ..types import GrowingReader, Reader, Sample
from .turns import Placed, Rows, Share, Turn, supervised_rows, windows

READERS = 4  # threads that read samples of a capture, each a copy out of the page cache
AHEAD = 8  # samples that are read before they are asked for
POLL_SECONDS = 0.2  # between two looks at a capture that is still being written
NOTE_SECONDS = 30.0  # between two lines that say so


@dataclass(slots=True)
class StoredSource:
    """Samples of a capture directory; the first epoch reads them as they were stored."""

    reader: Reader
    share: Share
    wait_note: str = ""
    longest: int | None = None  # tokens of a sample that are trained on
    _closed: threading.Event = field(default_factory=threading.Event)
    _complete: bool = False  # seen to be, where the capture may grow

    def close(self) -> None:
        """End the wait for a sample in another thread: there it raises Closed."""
        self._closed.set()

    def samples(
        self, position: int, /, end: int | None = None, rows: Rows = supervised_rows
    ) -> Iterator[Placed]:
        order = Order(self.share.seed, self.share.window, lambda _: len(self.reader))
        count = getattr(self.reader, "num_tokens", None)  # known without reading a sample
        share = self.share if count is not None else replace(self.share, batch=1)
        if count is None and share.tokens is not None:
            raise DataError(
                "train.batch_tokens needs a capture whose reader tells num_tokens(index), and this "
                "one's does not. Try: train.batch_size"
            )

        def look(place: int) -> tuple[int, int]:
            epoch, index = self._locate(place, order)
            tokens = int(count(index)) if count is not None else 0
            return epoch, tokens if self.longest is None else min(tokens, self.longest)

        supervised = getattr(self.reader, "num_supervised", None)

        def work(place: int) -> int:
            tokens, (_, index) = look(place)[1], self._locate(place, order)
            return rows(tokens, min(int(supervised(index)), tokens) if supervised else tokens)

        groups = windows(share, position, 1, look, lambda: len(self.reader), end=end, work=work)
        mine = (turn for group, done in groups for turn in group[done:])
        turn = next(mine)
        asked: deque[tuple[int, int, Turn, Future[Sample]]] = deque()
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="specforge-read")
        try:
            while True:
                # of a capture that grows, what is there already; only the next one is waited for
                while not asked or (len(asked) < AHEAD and self._is_there(turn.place)):
                    epoch, index = self._locate(turn.place, order)
                    read = pool.submit(self.reader.__getitem__, index)
                    asked.append((epoch, index, turn, read))
                    turn = next(mine)
                epoch, index, own, read = asked.popleft()
                yield Placed(epoch, index, index, read.result(), own.reached, own.counts)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_there(self, place: int) -> bool:
        growing = isinstance(self.reader, GrowingReader) and not self._complete
        return place < len(self.reader) or not growing

    def _locate(self, place: int, order: Order) -> tuple[int, int]:
        """Return the epoch and the stored index at `place` of the endless sequence."""
        if not self._is_there(place):
            self._wait(place)
        return (0, place) if place < len(self.reader) else order.at(place)

    def _wait(self, place: int) -> None:
        assert isinstance(self.reader, GrowingReader)
        noted = time.monotonic()
        while not self._look() and place >= len(self.reader):
            if time.monotonic() - noted > NOTE_SECONDS:
                noted = time.monotonic()
                console.print(f"waiting for sample {place}: {self.wait_note}")
            if self._closed.wait(POLL_SECONDS):
                raise Closed
        if len(self.reader) == 0:
            raise DataError("the capture finished without a sample. Try: specforge verify DIR")

    def _look(self) -> bool:
        assert isinstance(self.reader, GrowingReader)
        self._complete = self.reader.refresh()
        return self._complete
