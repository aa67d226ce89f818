"""What a chat template makes of a message: whether it writes all of it, and what form it wants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import Environment, TemplateError

from ..errors import DataError
from .messages import REASONING, Message, chat_of
from .sources import BadRow
from .tools import Tool

Render: TypeAlias = Callable[[Sequence[Message]], str]  # without a generation prompt
Shape: TypeAlias = tuple[object, ...]  # of a part of a message: what templates go by
REASONING_TEXT = "reasoning"
BEFORE = "text before "  # and the mark that ends a piece of a text
# a piece that says nothing: what opens thoughts, where there are none
EMPTY = re.compile(r"\s*(?:[<\[\u25c1][^\s<>\[\]\u25c1\u25b7]*[>\]\u25b7])?\s*")

ALIASES = {
    "tools": ("tools", "functions"),
    "tool_calls": ("tool_calls", "function_call"),
    REASONING[0]: REASONING,
}


@lru_cache
def marks_of(template: str) -> re.Pattern[str] | None:
    """Return what finds the marks in a text that a template names, such as `</think>`.

    A template takes a text apart at strings that stand in its own source: thoughts are closed by
    other ones in each family.  None where it has none, or is no template.
    """
    found: set[str] = set()
    with suppress(TemplateError):
        tokens = Environment().lexer.tokenize(template)
        found = {str(token.value).strip() for token in tokens if token.type == "string"}
    marks = [text for text in found if len(text) > 2 and not re.fullmatch(r"[\w\s]+", text)]
    longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
    return re.compile("|".join(map(re.escape, longest_first))) if marks else None


def as_parts(message: Message) -> Message:
    """Return a message whose text is OpenAI's list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_text_arguments(message: Message) -> Message:
    """Return a message, the arguments of its calls as texts of JSON, as a model writes them."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def check_ends(number: int, text: str, ends: Sequence[str]) -> None:
    """Raise BadRow for an answer, message `number`, with an end of answers and text behind it."""
    for end in ends:
        behind = text.partition(end)[2]
        for other in ends:
            behind = behind.replace(other, "")
        if behind.strip():
            raise BadRow(
                f"message {number + 1}: {end!r} in its text ends an answer, and the target never "
                "writes what stands behind it. Make two messages of it, or set data.on_error=skip",
                "text behind the end of an answer",
            )


def as_python(message: Message, written: str) -> str | None:
    """Return an object or a list of a call that stands in `written` as Python spells it, not JSON.

    Also one inside of the arguments.  A truth or a number alone is not looked for: nobody can tell
    it from a word of the text.  Targets that write a call as Python does, `name(list=['a'])`, were
    taught its spelling, too.
    """
    called = [call["function"] for call in message.get("tool_calls", ())]
    given = [call["arguments"] for call in called if f"{call['name']}(" not in written]
    said = [
        message["content"],
        message.get(REASONING[0], ""),
        json.dumps(given, ensure_ascii=False),
    ]
    for part in _containers(given):
        python = str(part)
        if python in written and not any(python in text for text in said):
            return python
    return None


def _containers(value: Mapping[str, Any] | list[Any]) -> Iterator[object]:
    """Yield the objects and lists inside of one, the outermost first."""
    for part in value.values() if isinstance(value, Mapping) else value:
        if isinstance(part, dict | list):
            yield part
            yield from _containers(part)


def reads_parts(template: str) -> bool:
    """Say whether a template's source has a word of the texts in a list of parts."""
    return re.search(r"\.text\b|\[\s*['\"]text['\"]\s*\]", template) is not None


def wants_parts(render: Render) -> bool:
    """Say whether a template reads texts from lists of parts alone, as image models' may.

    It then writes nothing of a plain text, or fails.  Servers give it parts, too.
    """
    asked: list[Message] = [{"role": "user", "content": text} for text in "ab"]
    if _differ(render, [[message] for message in asked]):
        return False
    return _differ(render, [[as_parts(message)] for message in asked])


def _differ(render: Render, chats: Iterable[Sequence[Message]]) -> bool:
    try:
        return len({render(chat) for chat in chats}) > 1
    except DataError:
        return False


def left_out(
    render: Render,
    messages: Sequence[Message],
    answers: Iterable[int],
    written: set[Shape],
    options: Mapping[str, Any],
    marks: re.Pattern[str] | None,
) -> tuple[int, str] | None:
    """Return the first message that a template does not write whole, and what is left out.

    The message is counted from 0.  A part that is written changes the text when it is another;
    each answer is looked at where it ends the conversation, before later turns may change it.
    `answers` are the messages that are trained on; `written` keeps what was found to be written;
    `marks` are those of the template.
    """
    tools = bool(options.get("tools"))
    begin = 0
    for end in answers:
        for number in range(begin, end + 1):
            message = messages[number]
            pieces = _pieces(message["content"], marks) if number == end else {}
            parts = [*pieces, *_parts(message, trained=number == end)]
            shape = (message["role"], messages[number - 1]["role"] if number else None, tools)
            for part in parts:
                key = (*shape, number == end, *parts, part)  # parts stand in for one another
                if key in written:
                    continue
                others = (
                    [*messages[:number], other, *messages[number + 1 : end + 1]]
                    for other in _others(message, part, pieces)
                )
                if not _written(render, messages[: end + 1], others):
                    return number, part
                written.add(key)
        begin = end + 1
    return None


def _written(
    render: Render, messages: Sequence[Message], others: Iterable[Sequence[Message]]
) -> bool:
    text = render(messages)
    try:
        return any(render(changed) != text for changed in others)
    except DataError:  # it was read
        return True


def _parts(message: Message, *, trained: bool) -> list[str]:
    """Return the names of what a message is made of; of what is trained on, also its reasoning."""
    parts = ["text"] if message["content"].strip() else []
    parts += [f"call {place + 1}" for place in range(len(message.get("tool_calls", ())))]
    if trained and REASONING[0] in message:
        parts.append(REASONING_TEXT)
    return parts


def _pieces(text: str, marks: re.Pattern[str] | None) -> dict[str, int]:
    """Return the ends of the pieces that a text with marks in it has, by their names.

    They are the first and the last before each mark, and what is behind them all.
    """
    found: dict[str, int] = {}
    begin = 0
    for mark in marks.finditer(text) if marks else ():
        if not EMPTY.fullmatch(text, begin, mark.start()):
            name = f"{BEFORE}{mark[0]!r}"
            found[f"{BEFORE}the last {mark[0]!r}" if name in found else name] = mark.start()
        begin = mark.end()
    if begin and not EMPTY.fullmatch(text, begin):
        found["text behind the last mark"] = len(text)
    return found


def _others(message: Message, part: str, pieces: Mapping[str, int]) -> Iterator[Message]:
    """Yield a message with another part: longer at its end, or where that may be cut, its start."""
    text = message["content"]
    if part == "text":
        yield {**message, "content": text + "x"}
        yield {**message, "content": "x" + text}
    elif part in pieces:
        yield {**message, "content": f"{text[: pieces[part]]}x{text[pieces[part] :]}"}
    elif part == REASONING_TEXT:
        yield message | dict.fromkeys(REASONING, message[REASONING[0]] + "x")
    else:
        calls, place = message["tool_calls"], int(part.removeprefix("call ")) - 1
        called = calls[place]["function"]
        other = {**calls[place], "function": {**called, "name": called["name"] + "x"}}
        yield {**message, "tool_calls": [*calls[:place], other, *calls[place + 1 :]]}


def altered(answer: str, shown: str, marks: re.Pattern[str] | None) -> bool:
    """Say whether an answer does not stand in the text that shows it, spaces aside.

    Of one with marks of the template in it each piece: what is between them is written elsewhere.
    """
    pieces = marks.split(answer) if marks else [answer]
    return any(
        piece.strip() not in shown and "".join(piece.split()) not in "".join(shown.split())
        for piece in pieces
        if not EMPTY.fullmatch(piece)
    )


def lost_mark(answer: str, written: str, marks: re.Pattern[str] | None) -> str | None:
    """Return a mark of an answer whose two sides stand in what is written of it without it.

    Spaces aside.  Where anything else is between them, that is the template's own mark; of one
    before all text nobody can tell: the prompt may hold it.
    """
    if marks is None or answer.strip() in written:
        return None
    whole, shown = "".join(answer.split()), "".join(written.split())
    before, begin, lost = "", 0, None
    for mark in (*marks.finditer(answer), None):
        end = len(answer) if mark is None else mark.start()
        blank = EMPTY.fullmatch(answer, begin, end)
        piece = "" if blank else "".join(answer[begin:end].split())
        if before and piece and shown.count(before + piece) > whole.count(before + piece):
            return lost
        if mark is not None:
            before, begin, lost = piece, mark.end(), mark[0]
    return None


def unread(template: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str | None:
    """Return which of a conversation's fields a chat template has no word of, if there is one.

    What it does not read is not in the text, and the target would be trained without it.
    """
    if tools and not re.search(r"\btools\b", template):
        return "tools"
    if any("tool_calls" in m for m in messages) and not re.search(r"\btool_calls\b", template):
        return "tool_calls"
    if any(REASONING[0] in message for message in messages):
        named = "|".join(REASONING)
        if not re.search(rf"\.(?:{named})\b|['\"](?:{named})['\"]", template):
            return REASONING[0]
    return None


def spelled(row: Mapping[str, Any], name: str) -> list[str]:
    """Return the names under which a row has what `unread` calls `name`."""
    turns = chat_of(row)
    parts = [row, *(turn for turn in turns if isinstance(turn, Mapping))] if turns else [row]
    return [alias for alias in ALIASES[name] if any(alias in part for part in parts)] or [name]
