"""Prompts that can be read while the rest of them is still tokenized, by a thread or a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..files import inside
from ..types import Prompt
from .promptset import PromptSet, Spool, Told
from .tokencache import GROWING, POLL_SECONDS, Fill, on_disk

NAMES = ("offsets", "input_ids", "loss_mask")


class Closed(Exception):
    """Raised where something is waited for that nobody wants any more."""


class Stream:
    """Tokenized conversations, the same as `on_disk` returns, from the first row on.

    One process of a machine tokenizes; the others read the files that it writes, and one of them
    goes on where it ends too early.  A thread of this process does or awaits that.
    """

    def __init__(
        self, folder: Path, key: str, fill: Fill, ended: Callable[[PromptSet], None]
    ) -> None:
        self._pointer, self._fill, self._ended = folder / f"{key}{GROWING}", fill, ended
        self._all: PromptSet | None = None
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._files: list[int] = []
        self._stack = ExitStack()
        self._from = ""  # the folder that the files are in
        self._count = 0  # rows that can be read in them
        self._thread = threading.Thread(target=self._run, args=(folder, key), daemon=True)
        self._thread.start()

    def _run(self, folder: Path, key: str) -> None:
        try:
            found = on_disk(folder, key, self._write, self._check)
            self._ended(found)
            self._all = found
        except BaseException as exc:  # raised where a row is waited for
            self._error = exc

    def _write(self, spool: Spool) -> Told:
        spool.check = self._check
        return self._fill(spool)

    def _check(self) -> None:
        if self._closed.is_set():
            raise Closed

    def wait(self, count: int | None = None) -> int:
        """Wait for so many rows, or for all of them; return how many can be read, fewer if all.

        Raises what is wrong with the data, and Closed.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._all is not None:
                return len(self._all)
            if count is not None and self._count < count:
                self._look()
            if count is not None and self._count >= count:
                return self._count
            if self._closed.wait(POLL_SECONDS):
                raise Closed

    def _look(self) -> None:
        """See how far the process is that tokenizes."""
        with suppress(OSError, ValueError):
            name = self._pointer.read_text()
            if name != self._from:
                folder = inside(self._pointer.parent, name)
                with ExitStack() as stack:
                    files = [stack.enter_context((folder / file).open("rb")) for file in NAMES]
                    self._stack.close()
                    self._stack = stack.pop_all()
                self._files, self._from = [file.fileno() for file in files], name
        if self._files:
            self._count = max(0, os.fstat(self._files[0]).st_size // 8 - 1)

    def __getitem__(self, index: int) -> Prompt:
        """Return a row that was waited for."""
        if self._all is not None:
            return self._all[index]
        offsets, input_ids, loss_mask = self._files
        start, end = _read(offsets, torch.int64, index, index + 2).tolist()
        return Prompt(
            index=index,
            input_ids=_read(input_ids, torch.int32, start, end).long(),
            loss_mask=_read(loss_mask, torch.int8, start, end).long(),
        )

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is supervised, [V] int64; waits for all rows."""
        self.wait()
        assert self._all is not None
        return self._all.token_counts(vocab_size)

    def stop(self) -> None:
        """Stop tokenizing; a wait in another thread raises Closed."""
        self._closed.set()

    def close(self) -> None:
        """Stop, and close the files: nobody reads any more."""
        self.stop()
        self._thread.join()
        self._stack.close()
        self._files = []


def _read(file: int, dtype: torch.dtype, start: int, end: int) -> Tensor:
    size = dtype.itemsize
    return torch.frombuffer(
        bytearray(os.pread(file, (end - start) * size, start * size)), dtype=dtype
    )
