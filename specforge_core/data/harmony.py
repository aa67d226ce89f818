"""Answers in channels (gpt-oss), as servers hand them on: thoughts and calls apart from the text.

The template writes the channels itself, and refuses a message that holds them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .sources import Message

CHANNEL = "<|channel|>"
# whom a part is for stands before its channel or behind it
PART = re.compile(
    r"(?: to=(\S+?))?<\|channel\|>(analysis|commentary|final)(?: to=([^\s<]+))?"
    r"(?: ?(?:<\|constrain\|>)?\w+)?<\|message\|>(.*?)"
    r"(?:<\|end\|>|<\|call\|>|$)(?:<\|start\|>assistant(?=<\|channel\|>| to=))?",
    re.DOTALL,
)
FUNCTION = "functions."


def as_message(text: str) -> Message:
    """Return the message of an answer, whose text is without the token that ended it.

    Of channels what was said to the user is kept, what was thought, and calls of functions; no
    header that was broken off, and no arguments.
    """
    part = PART.match(text)
    if part is None and not text.startswith(CHANNEL):
        return {"role": "assistant", "content": text}
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    while part is not None:
        to = part[1] or part[3]
        if to is None:
            (thought if part[2] == "analysis" else said).append(part[4])
        elif to.startswith(FUNCTION) and (arguments := _object(part[4])) is not None:
            function = {"name": to.removeprefix(FUNCTION), "arguments": arguments}
            calls.append({"type": "function", "function": function})
        part = PART.match(text, part.end())
    message: Message = {"role": "assistant", "content": "\n".join(said)}
    if thought:
        message["reasoning_content"] = "\n".join(thought)
    if calls:
        message["tool_calls"] = calls
    return message


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
