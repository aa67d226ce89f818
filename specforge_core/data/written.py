"""What a chat template makes of a message: whether it writes all of it, and what form it wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import DataError
from .messages import REASONING, Message, chat_of
from .tools import Tool

Render: TypeAlias = Callable[[Sequence[Message]], str]  # without a generation prompt
Shape: TypeAlias = tuple[object, ...]  # of a part of a message: what templates go by
REASONING_TEXT = "reasoning"
THOUGHTS = "thoughts"  # reasoning in the text itself, between these marks
OPENED, CLOSED = "<think>", "</think>"

ALIASES = {
    "tools": ("tools", "functions"),
    "tool_calls": ("tool_calls", "function_call"),
    REASONING[0]: REASONING,
}


def as_parts(message: Message) -> Message:
    """Return a message whose text is OpenAI's list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


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
) -> tuple[int, str] | None:
    """Return the first message that a template does not write whole, and what is left out.

    The message is counted from 0.  A part that is written changes the text when it is another;
    each answer is looked at where it ends the conversation, before later turns may change it.
    `answers` are the messages that are trained on; `written` keeps what was found to be written.
    """
    tools = bool(options.get("tools"))
    begin = 0
    for end in answers:
        for number in range(begin, end + 1):
            message = messages[number]
            parts = _parts(message, trained=number == end)
            shape = (message["role"], messages[number - 1]["role"] if number else None, tools)
            for part in parts:
                key = (*shape, number == end, *parts, part)  # parts stand in for one another
                if key in written:
                    continue
                others = (
                    [*messages[:number], other, *messages[number + 1 : end + 1]]
                    for other in _others(message, part)
                )
                if not _written(render, messages[: end + 1], others):
                    return number, REASONING_TEXT if part == THOUGHTS else part
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
    """Return the names of what a message is made of; of what is trained on, also its thoughts."""
    parts = ["text"] if message["content"].strip() else []
    parts += [f"call {place + 1}" for place in range(len(message.get("tool_calls", ())))]
    if trained and REASONING[0] in message:
        parts.append(REASONING_TEXT)
    if trained and CLOSED in message["content"]:
        thoughts = message["content"].partition(CLOSED)[0].rpartition(OPENED)[2]
        parts += [THOUGHTS] if thoughts.strip() else []
    return parts


def _others(message: Message, part: str) -> Iterator[Message]:
    """Yield a message with another part: longer at its end, or where that may be cut, its start."""
    text = message["content"]
    if part == "text":
        yield {**message, "content": text + "x"}
        yield {**message, "content": "x" + text}
    elif part == THOUGHTS:
        yield {**message, "content": text.replace(CLOSED, "x" + CLOSED, 1)}
    elif part == REASONING_TEXT:
        yield message | dict.fromkeys(REASONING, message[REASONING[0]] + "x")
    else:
        calls, place = message["tool_calls"], int(part.removeprefix("call ")) - 1
        called = calls[place]["function"]
        other = {**calls[place], "function": {**called, "name": called["name"] + "x"}}
        yield {**message, "tool_calls": [*calls[:place], other, *calls[place + 1 :]]}


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
