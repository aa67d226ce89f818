"""Hands frames over in the background, so that the model's next forward pass need not wait."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from . import DIRECTORY_ENV, RECEIVERS_ENV, spool
from .ask import Ask

logger = logging.getLogger("specforge_sglang_capture")

MAX_PENDING = 1 << 30  # bytes that wait to be handed over before forward passes have to wait
THREADS = 4  # new pages of a tmpfs are filled at 1 to 2 GB/s by one
SWEEP_SECONDS = 10.0
NO_SPACE_SECONDS = 120.0  # how long a full tmpfs is waited for: the reader is slower than we are
RETRIES = 5


@dataclass(frozen=True, slots=True)
class Parcel:
    """One frame to hand over; `pieces` waits for the copy from the device."""

    ask: Ask
    size: int  # bytes
    pieces: Callable[[], Sequence[memoryview]]


class Sender:
    """Background threads that hand frames over, and sweep the directories of dead readers."""

    def __init__(
        self,
        root: Path | None = None,
        threads: int = THREADS,
        receivers: Collection[str] | None = None,
    ) -> None:
        named = os.environ.get(RECEIVERS_ENV, "").split(",") if receivers is None else receivers
        self._receivers = frozenset(name.strip().lower() for name in named) - {""}
        self.root = root or Path(os.environ.get(DIRECTORY_ENV) or spool.default_root())
        self._queue: SimpleQueue[Parcel] = SimpleQueue()
        self._pending = 0
        self._changed = threading.Condition()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()
        threading.Thread(target=self._sweep, daemon=True).start()

    def put(self, parcel: Parcel) -> None:
        """Queue a frame; waits while too much is queued already."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending < MAX_PENDING)
            self._pending += parcel.size
        self._queue.put(parcel)

    def _work(self) -> None:
        while True:
            parcel = self._queue.get()
            try:
                send = self._send_file if parcel.ask.way == "files" else self._send_http
                send(parcel.ask, parcel.pieces())
            except Exception as exc:  # the reader notices that nothing came, and says so
                logger.error("capture %s was not handed over: %s", parcel.ask.name, exc)
            finally:
                with self._changed:
                    self._pending -= parcel.size
                    self._changed.notify_all()

    def _send_file(self, ask: Ask, pieces: Sequence[memoryview]) -> None:
        directory = self.root / ask.place
        part = directory / f".{ask.name}.part"
        give_up = time.monotonic() + NO_SPACE_SECONDS
        while spool.has_reader(directory):
            try:
                spool.claim(directory, part, sum(map(len, pieces)))
                _write(part, pieces)
                part.rename(directory / ask.name)
                return
            except OSError as exc:
                spool.free(part)
                if exc.errno != errno.ENOSPC or time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
        logger.warning("capture %s has no reader: %s is gone", ask.name, directory)

    def _send_http(self, ask: Ask, pieces: Sequence[memoryview]) -> None:
        address, token = ask.place.rsplit("/", 1)
        if not self._receivers.intersection((address.lower(), address.rpartition(":")[0].lower())):
            # whoever can send a request may not make this server call another machine
            raise PermissionError(
                f"{address} is no receiver that this server was told of. Start it with "
                f"{RECEIVERS_ENV}={address}"
            )
        _post(ask, address, token, pieces)

    def _sweep(self) -> None:
        while True:
            spool.sweep(self.root)
            time.sleep(SWEEP_SECONDS)


def _write(path: Path, pieces: Sequence[memoryview]) -> None:
    """Write the pieces at the beginning of a file, which may be longer."""
    left = [piece for piece in pieces if len(piece)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        while left:
            count = os.writev(descriptor, left)  # all at once: each call waits for the model's
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]
    finally:
        os.close(descriptor)


def _post(ask: Ask, address: str, token: str, pieces: Sequence[memoryview]) -> None:
    for attempt in range(RETRIES):
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            connection.putrequest("POST", f"/{token}/{ask.name}", skip_accept_encoding=True)
            connection.putheader("Content-Length", str(sum(map(len, pieces))))
            connection.endheaders()
            for piece in pieces:
                connection.send(piece)
            status = connection.getresponse().status
            if status != 200:
                logger.warning("capture %s was refused by its reader: %d", ask.name, status)
            return
        except (OSError, http.client.HTTPException):
            if attempt == RETRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
        finally:
            connection.close()
