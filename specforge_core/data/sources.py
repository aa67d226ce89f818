"""Conversations from rows of data: OpenAI `messages`, and ShareGPT `conversations`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..config import DataConfig
from ..errors import DataError

# what opens one source: the rows of it, a DataError in the place of a bad one
Rows: TypeAlias = Callable[[str, DataConfig], Iterable[Mapping[str, Any] | DataError]]
Message = dict[str, str]  # "role", "content", and "reasoning_content" where there is one

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
}

_SKIP = "Correct the line, or set data.on_error=skip"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of a file, in OpenAI form."""

    messages: tuple[Message, ...]
    where: str  # "file.jsonl:12"
    row: Mapping[str, Any]  # the line as it was, for its id and other metadata


def read_conversations(
    sources: Iterable[str],
    data: DataConfig,
    rows: Rows,
    *,
    limit: int | None = None,
    need_answer: bool = True,
) -> Iterator[Conversation]:
    """Yield the conversations of all sources, in order, at most `limit` of them.

    Raises DataError for a bad row (unless `data.on_error` is "skip"), and always for
    a missing source or when nothing is left.  Without `need_answer` a conversation
    needs a user turn only.
    """
    sources = tuple(sources)
    first_bad: DataError | None = None
    count = 0
    for found in scan(sources, data, rows, need_answer=need_answer):
        if isinstance(found, Conversation):
            count += 1
            yield found
            if count == limit:
                return
        elif data.on_error == "raise":
            raise found
        else:
            first_bad = first_bad or found
    if not count:
        raise nothing_left(sources, first_bad)


def scan(
    sources: Iterable[str], data: DataConfig, rows: Rows, *, need_answer: bool
) -> Iterator[Conversation | DataError]:
    """Yield every row of the sources, read or as the error that says what is wrong with it."""
    # all of them before any work: a misspelled last one should not cost an hour
    opened = [(source, rows(source, data)) for source in sources]
    for source, found in opened:
        for number, row in enumerate(found, 1):
            if isinstance(row, DataError):
                yield row
            else:
                where = row.where if isinstance(row, Line) else f"{source}:{number}"
                yield _conversation(row, where, need_answer)


class Line(dict[str, Any]):
    """A row that knows where it was read."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        super().__init__(row)
        self.where = where


def read_jsonl(source: str) -> Iterator[Line | DataError]:
    """Yield the rows of a file of JSON lines; DataError at once when there is no such file."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"data file {source!r} does not exist. Paths are taken from the working "
            f"directory, {Path.cwd()}; correct it in the config, or with KEY=[PATH]"
        )
    return _lines(path)


def _lines(path: Path) -> Iterator[Line | DataError]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{path.name}:{number}")
    except OSError as exc:
        raise DataError(f"data file {str(path)!r} cannot be read: {exc.strerror}") from exc


def _parse(line: bytes, where: str) -> Line | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:  # also bytes that are not UTF-8
        array = line.lstrip().startswith(b"[")
        hint = "one JSON array? Try: jq -c '.[]' FILE > FILE.jsonl" if array else _SKIP
        return DataError(f"{where} is not a line of JSON ({exc}). {hint}")
    if not isinstance(row, dict):
        return DataError(f"{where}: expected an object, found {type(row).__name__}. {_SKIP}")
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
    row: Mapping[str, Any], where: str, need_answer: bool
) -> Conversation | DataError:
    try:
        messages = _messages(row)
    except ValueError as exc:
        return DataError(f"{where}: {exc}. {_SKIP}")
    roles = {message["role"] for message in messages}
    if need_answer and "assistant" not in roles:
        return DataError(
            f"{where}: the conversation has no assistant turn, so nothing to train on. "
            "Try: specforge regenerate, or data.on_error=skip"
        )
    if not need_answer and "user" not in roles:
        return DataError(f"{where}: the conversation has no user turn to answer. {_SKIP}")
    return Conversation(tuple(messages), where, row)


def _messages(row: Mapping[str, Any]) -> list[Message]:
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"needs a list 'messages' or 'conversations', has the keys {keys}")
    if row.get("tools"):
        raise ValueError("'tools' are not supported")
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is not an object: {turn!r}")
    if turn.get("tool_calls"):
        raise ValueError(f"message {number} has 'tool_calls', which are not supported")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"message {number} has the role {role!r}; known are {', '.join(sorted(ROLES))}"
        )
    message = {"role": ROLES[role], "content": _text(turn.get("content", turn.get("value")))}
    if turn.get("reasoning_content"):
        message["reasoning_content"] = _text(turn["reasoning_content"])
    return message


def _text(content: object) -> str:
    """Return a message's text, of OpenAI's list of parts too."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(str(part.get("text", "")) for part in content if _is_text(part))
    if not isinstance(content, str):
        raise ValueError(f"a message's content must be text, found {content!r:.60}")
    try:
        content.encode()
    except UnicodeEncodeError as exc:  # half a surrogate pair, which tokenizers refuse
        raise ValueError(f"a message is not valid Unicode ({exc})") from exc
    return content


def _is_text(part: Mapping[str, object]) -> bool:
    if part.get("type", "text") != "text":
        raise ValueError(f"a message has a part of type {part['type']!r}; only text is supported")
    return True
