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
    written: dict[Shape, bool],
    options: Mapping[str, Any],
) -> tuple[int, str] | None:
    """Return the first message that a template does not write whole, and what is left out.

    The message is counted from 0.  A part that is written changes the text when it is another;
    each answer is looked at where it ends the conversation, before later turns may change it.
    `answers` are the messages that are trained on; `written` keeps what was found out.
    """
    begin = 0
    for end in answers:
        for number in range(begin, end + 1):
            for shape, name, other in _parts(messages, number, trained=number == end):
                key = (*shape, bool(options.get("tools")))
                if key not in written:
                    rest = messages[number + 1 : end + 1]
                    changed = [*messages[:number], other, *rest]
                    written[key] = _written(render, messages[: end + 1], changed)
                if not written[key]:
                    return number, name
        begin = end + 1
    return None


def _written(render: Render, messages: Sequence[Message], changed: Sequence[Message]) -> bool:
    text = render(messages)
    try:
        return render(changed) != text
    except DataError:  # it was read
        return True


def _parts(
    messages: Sequence[Message], number: int, *, trained: bool
) -> Iterator[tuple[Shape, str, Message]]:
    """Yield the shape and name of each part of a message, and the message with another part."""
    message = messages[number]
    before = messages[number - 1]["role"] if number else None
    calls = message.get("tool_calls", [])
    shape = (message["role"], before, len(calls) > 0, trained)
    if message["content"].strip():
        yield (*shape, "text"), "text", {**message, "content": message["content"] + "x"}
    for place, call in enumerate(calls):
        function = {**call["function"], "name": call["function"]["name"] + "x"}
        other = [*calls[:place], {**call, "function": function}, *calls[place + 1 :]]
        yield (*shape, place), f"call {place + 1}", {**message, "tool_calls": other}
    if trained and REASONING[0] in message:
        thought = message[REASONING[0]] + "x"
        yield (*shape, "reasoning"), "reasoning", message | dict.fromkeys(REASONING, thought)


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
