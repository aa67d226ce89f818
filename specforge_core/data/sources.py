"""Conversations from rows of data: OpenAI `messages`, and ShareGPT `conversations`."""

from __future__ import annotations

import json
from codecs import getreader
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from ..config import DataConfig
from ..documents import KeyTwice, decode_one, each_key_once
from ..errors import DataError
from ..text import counted
from .hints import SKIP, of_line, of_row
from .messages import Message as Message, parse, tokens_alone
from .tools import Tool

# what opens one source: the rows of it, a DataError in the place of a bad one
Rows: TypeAlias = Callable[[str, DataConfig], Iterable[Mapping[str, Any] | DataError]]
PIECE = 1 << 20  # characters of an array that are read at once
MAX_LINE = 64 << 20  # bytes of one line, far beyond any conversation


class BadRow(DataError):
    """What is wrong with one row; `reason` is what such rows are counted by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        """Say how another process makes it again."""
        return type(self), (str(self.args[0]), self.reason)

    def at(self, where: str) -> BadRow:
        """Return it with the place of its row in front."""
        return BadRow(f"{where}: {self}", self.reason)


@dataclass(slots=True)
class Skipped:
    """Rows that cannot be used: `data.on_error` says whether the first one is an error."""

    on_error: Literal["raise", "skip"]
    counts: Counter[str] = field(default_factory=Counter)  # by reason
    first: DataError | None = None

    def add(self, error: DataError) -> None:
        """Count a row, or raise what is wrong with it."""
        if self.on_error == "raise":
            raise error
        self.count(error)

    def count(self, error: DataError) -> None:
        """Count a row that another setting than `data.on_error` allows to leave out."""
        self.counts[error.reason if isinstance(error, BadRow) else "unreadable"] += 1
        self.first = self.first or error

    def __str__(self) -> str:
        """Return "3 rows skipped (2 not JSON, 1 too long)"."""
        return f"{counted(self.counts.total(), 'row')} skipped ({told(self.counts)})"


def told(counts: Mapping[str, int]) -> str:
    """Return "2 not JSON, 1 too long", the most frequent reason first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of a file, in OpenAI form."""

    messages: tuple[Message, ...]  # none where the row is tokens alone
    where: str  # "file.jsonl:12"
    source: str  # as the config names it
    row: Mapping[str, Any]  # the line as it was, for its id and other metadata
    tools: tuple[Tool, ...] = ()  # that the assistant may call


def read_conversations(
    sources: Iterable[str],
    data: DataConfig,
    rows: Rows,
    *,
    need_answer: bool = True,
    skipped: Skipped | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of all sources, in order.

    Raises DataError for a bad row (unless `data.on_error` is "skip": then it is counted in
    `skipped`), and always for a missing source or when nothing is left.  Without `need_answer`
    a conversation needs a user turn only.
    """
    sources = tuple(sources)
    skipped = Skipped(data.on_error) if skipped is None else skipped
    some = False
    for found in scan(sources, data, rows, need_answer=need_answer):
        if isinstance(found, Conversation):
            some = True
            yield found
        else:
            skipped.add(found)
    if not some:
        raise nothing_left(sources, skipped.first)


def scan(
    sources: Iterable[str], data: DataConfig, rows: Rows, *, need_answer: bool
) -> Iterator[Conversation | DataError]:
    """Yield every row of the sources, read or as the error that says what is wrong with it."""
    # all of them before any work: a misspelled last one should not cost an hour
    opened = [(source, rows(source, data)) for source in sources]
    return chain.from_iterable(conversations(opened, data, need_answer=need_answer))


def conversations(
    opened: Iterable[tuple[str, Iterable[Mapping[str, Any] | DataError]]],
    data: DataConfig,
    *,
    need_answer: bool,
) -> list[Iterator[Conversation | DataError]]:
    """Return the rows of each source that was opened, as `scan` yields them."""
    names = Counter(Path(source).name for source, _ in opened)
    return [
        _read(source, found, data, need_answer, shared=names[Path(source).name] > 1)
        for source, found in opened
    ]


def mixed(
    sources: Sequence[Iterator[Conversation | DataError]], weights: Sequence[float]
) -> Iterator[Conversation | DataError]:
    """Yield the conversations of several sources in proportion to their weights.

    Every beginning of what is yielded has that proportion, so it ends with the first source that
    ends.  Without weights one source comes behind the other, to its end.
    """
    if not weights:
        yield from chain.from_iterable(sources)
        return
    taken = [0] * len(sources)
    while True:
        turn = min(range(len(sources)), key=lambda i: (taken[i] + 1) / weights[i])
        for found in sources[turn]:
            yield found
            if isinstance(found, Conversation):
                break
        else:
            return
        taken[turn] += 1


def _read(
    source: str,
    found: Iterable[Mapping[str, Any] | DataError],
    data: DataConfig,
    need_answer: bool,
    *,
    shared: bool,
) -> Iterator[Conversation | DataError]:
    name = Path(source).name
    folder = source.removesuffix(name) if shared else ""  # to tell two of one name apart by
    for number, row in enumerate(found, 1):
        if isinstance(row, BadRow) and str(row).startswith(name):
            yield BadRow(f"{folder}{row}", row.reason)
        elif isinstance(row, DataError):
            yield row
        else:
            where = f"{folder}{row.where}" if isinstance(row, Line) else f"{source}:{number}"
            yield _conversation(row, where, source, data, need_answer)


class Line(dict[str, Any]):
    """A row that knows where it was read."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        super().__init__(row)
        self.where = where


def read_lines(file: IO[bytes], name: str, first: int = 1) -> Iterator[Line | DataError]:
    """Yield the rows of JSON lines; the file is called `name`, its next line is number `first`."""
    for line, number in lines_of(file, first):
        where = f"{name}:{number}"
        if len(line) > MAX_LINE:
            yield BadRow(f"{where} is longer than {MAX_LINE:,} bytes. {SKIP}", "too long")
        else:
            yield _parse(line, where)


def lines_of(file: IO[bytes], number: int = 1) -> Iterator[tuple[bytes, int]]:
    """Yield the lines that are rows, of very long ones the beginning, with their numbers."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            _pass_over(line, file)
        if len(line) > MAX_LINE or line.strip():
            yield line, number
        number += 1


def read_array(file: IO[bytes], name: str) -> Iterator[Line | DataError]:
    """Yield the objects of one JSON array, of which no more than a piece is in memory.

    Raises DataError where it cannot be read: nobody knows how many rows would be lost.
    """
    reader = getreader("utf-8-sig")(file)
    number, size = 0, PIECE
    try:
        head = reader.read(size)
        text, place = head.lstrip()[1:], 0  # behind the bracket
        line = 1 + head.count("\n", 0, len(head) - len(text))  # that `text` begins in
        while True:
            while place < len(text) and text[place] in " \t\r\n,":
                place += 1
            if text.startswith("]", place):
                if (text[place + 1 :] + reader.read(PIECE)).strip():
                    raise ValueError("more follows behind the array")
                return
            try:
                row, place = decode_one(text, place, line)
            except json.JSONDecodeError:
                more = reader.read(size)
                line += text.count("\n", 0, place)
                text, place, size = text[place:] + more, 0, 2 * size
                if not more or len(text) > MAX_LINE:
                    raise
                continue
            number, size = number + 1, PIECE
            yield _row(row, f"{name}:{number}")
    except (ValueError, RecursionError) as exc:
        raise DataError(
            f"object {number + 1} of the array in {name} is not JSON that can be read ({exc}). "
            "Correct the file, or make lines of it, of which bad ones can be skipped"
        ) from exc


def _pass_over(line: bytes, file: IO[bytes]) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)


def _parse(line: bytes, where: str) -> Line | DataError:
    try:
        # of bytes json would guess the code by zeros
        row = json.loads(str(line, "utf-8-sig"), object_pairs_hook=each_key_once)
    except RecursionError:
        return BadRow(f"{where} is JSON nested too deeply to be read. {SKIP}", "not JSON")
    except ValueError as exc:  # also bytes that are not UTF-8
        return BadRow(f"{where} is not a line of JSON ({exc}). {of_line(line, exc)}", "not JSON")
    return _row(row, where)


def _row(row: object, where: str) -> Line | DataError:
    if isinstance(row, KeyTwice):
        return BadRow(f"{where}: {row}. {SKIP}", "not JSON")
    if not isinstance(row, dict):
        found = type(row).__name__
        return BadRow(f"{where}: expected an object, found {found}. {SKIP}", "not a conversation")
    return Line(row, where)


def nothing_left(files: Iterable[str], first_bad: DataError | None) -> DataError:
    """Return the error for data without one usable conversation."""
    names = ", ".join(map(str, files))
    if first_bad is None:
        return DataError(f"no conversations in {names}: write one JSON object a line")
    return DataError(
        f"every conversation in {names} was skipped, the first because of this: {first_bad}"
    )


def _conversation(
    row: Mapping[str, Any], where: str, source: str, data: DataConfig, need_answer: bool
) -> Conversation | DataError:
    try:
        if tokens_alone(row, data.ignore_fields):
            if need_answer:
                return Conversation((), where, source, row)
            return BadRow(f"{where}: tokens ask no question. {SKIP}", "without a question")
        parsed = parse(row, data.ignore_fields)
    except ValueError as exc:
        return BadRow(f"{where}: {exc}. {of_row(row) or SKIP}", "not a conversation")
    roles = {message["role"] for message in parsed.messages}
    if need_answer and "assistant" not in roles:
        return BadRow(
            f"{where}: the conversation has no assistant turn, so nothing to train on. "
            "Try: specforge regenerate, or data.on_error=skip",
            "without an answer",
        )
    if not need_answer and "user" not in roles:
        return BadRow(
            f"{where}: the conversation has no user turn to answer. {SKIP}", "without a question"
        )
    return Conversation(parsed.messages, where, source, row, parsed.tools)
