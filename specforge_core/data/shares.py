"""Shares of prompts that a target answers in a thread, beside what else it does."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..documents import check_regular
from ..errors import RunError
from ..files import prepare_folder, refusing, write_file
from ..locks import InTurn
from ..progress import console
from ..target.engine import TransformersEngine
from ..text import counted
from ..types import Generated, GenerateOptions, Prompt, TargetEngine, TargetInfo
from .regenerate import answered, origin_of
from .respond import Answerer, Task
from .sources import told
from .stream import Closed

SLICE_SECONDS = 1.0  # of a batch of answers, after which others get the engine that wait for it
POLL_SECONDS = 0.005  # between two looks whether all is answered
CHECKSUM = "share_checksum"  # in each row of a share: of all its rows, without this field

Range = tuple[int, int]  # the first prompt of a share, and the one behind its last


def file_of(share: Range) -> str:
    """Return the name of a share's file."""
    return f"{share[0]:08d}-{share[1]:08d}.jsonl"


@dataclass(frozen=True, slots=True)
class Turns:
    """A target engine that answers a batch at a time, and lets others use it in between.

    A batch may take minutes, in which the training, and all ranks with it, would wait.  So in this
    process others have it between two tokens of a batch, and an engine that `answers_beside` its
    other calls is waited for by nobody.
    """

    engine: TargetEngine
    lock: InTurn  # held by whoever uses the engine
    batch_size: int
    closed: threading.Event

    @property
    def info(self) -> TargetInfo:
        return self.engine.info

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Answer all prompts.  Raises Closed, also in the middle of an answer in this process."""
        beside = getattr(self.engine, "answers_beside", False)
        for start in range(0, len(prompts), self.batch_size):
            with nullcontext() if beside else self.lock:
                self._check()
                found = self._batch(prompts[start : start + self.batch_size], options)
            yield from found

    def _batch(self, prompts: Sequence[Prompt], options: GenerateOptions) -> list[Generated]:
        if not isinstance(self.engine, TransformersEngine):
            return list(self.engine.generate(prompts, options))
        mine, since = threading.get_ident(), time.monotonic()

        def between(*_: object) -> None:
            nonlocal since
            if threading.get_ident() != mine:  # others run the model while they have it
                return
            if time.monotonic() - since >= SLICE_SECONDS:
                self.lock.give_way()
                since = time.monotonic()
            self._check()

        hook = self.engine.model.register_forward_pre_hook(between)
        try:
            return list(self.engine.generate(prompts, options))
        finally:
            hook.remove()

    def _check(self) -> None:
        if self.closed.is_set():
            raise Closed


class Shares:
    """Answers the shares that are asked for one behind the other, each into a file of its own.

    A file is there whole or not at all, so that an answer never hangs on when a process ended.
    One that is there, of the same prompts, target and sampling, is not written again.
    """

    def __init__(
        self,
        run: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        engine: TargetEngine,
        lock: InTurn,
        tasks: Sequence[Task],
        folder: Path,
    ) -> None:
        # what cannot be answered is left out: an error would end a training that goes well
        data = run.data.model_copy(update={"on_error": "skip", "too_long": "skip"})
        self._run, self._tokenizer = run.model_copy(update={"data": data}), tokenizer
        self._engine, self._lock, self._tasks = engine, lock, tasks
        self._origin = origin_of(run, tokenizer)
        self._folder = folder
        self._closed = threading.Event()
        self._asked: queue.Queue[Range] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def ask(self, share: Range) -> None:
        """Begin with a share, once those before it are answered."""
        self._asked.put(share)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="specforge-answers")
            self._thread.daemon = True
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait so long for all that was asked for; say whether it is there.

        Raises what kept the target from answering.
        """
        until = time.monotonic() + seconds
        while self._error is None and self._asked.unfinished_tasks:
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        return True

    def close(self, seconds: float) -> None:
        """Give up what is not answered; wait so long for the thread, which uses the engine."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            while not self._closed.is_set():
                with suppress(queue.Empty):
                    share = self._asked.get(timeout=0.1)
                    self._answer(share)
                    self._asked.task_done()
        except Closed:
            pass
        except BaseException as exc:  # raised where the answers are waited for
            self._error = exc

    def _answer(self, share: Range) -> None:
        tasks = self._tasks[slice(*share)]
        path = self._folder / file_of(share)
        if self._is_of(path, tasks):
            return
        size = self._run.regenerate.batch_size
        turns = Turns(self._engine, self._lock, size, self._closed)
        chats = list(Answerer(self._run, self._tokenizer, turns).answer(tasks))
        kept = sorted((c for c in chats if c.messages), key=lambda chat: chat.task.place)
        with refusing(RunError, "Make room there"):
            prepare_folder(self._folder)
            write_file(path, share_text([answered(chat, self._origin) for chat in kept]))
        dropped = Counter(str(chat.dropped) for chat in chats if not chat.messages)
        why = f" ({told(dropped)})" if dropped else ""
        console.print(f"{path}: {len(kept)} of {counted(len(tasks), 'prompt')} answered{why}")

    def _is_of(self, path: Path, tasks: Sequence[Task]) -> bool:
        """Say whether a file has answers to these prompts, as this run would write them."""
        asked = {task.id: _others(m for turn in task.turns for m in turn) for task in tasks}
        try:
            rows = read_share(path)
            if {row[CHECKSUM] for row in rows} != {_checksum(rows)}:
                return False  # also where there are none
            if len({row["id"] for row in rows}) < len(rows):
                return False
            for row in rows:
                own = _others(row["messages"])
                if asked[row["id"]][: len(own)] != own or not self._origin.items() <= row.items():
                    return False
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False
        return True


def _others(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages that are not the assistant's, whose calls of tools are asked, too."""
    return [message for message in messages if message["role"] != "assistant"]


def share_text(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a share's file: a row that is changed, missing or of another share is noticed."""
    whole = {CHECKSUM: _checksum(rows)}
    return b"".join(json.dumps({**row, **whole}).encode() + b"\n" for row in rows)


def _checksum(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = xxhash.xxh3_128()
    for row in rows:
        own = {name: value for name, value in row.items() if name != CHECKSUM}
        digest.update(json.dumps(own).encode() + b"\n")
    return digest.hexdigest()


def read_share(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a share.  Raises OSError, and ValueError for what is no such file."""
    check_regular(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return rows
