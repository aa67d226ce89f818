"""Answers in channels (gpt-oss), as servers hand them on: thoughts apart from what was said.

The template writes the channels itself, and refuses a message that holds them.
"""

from __future__ import annotations

import re

from .sources import Message

CHANNEL = "<|channel|>"
PART = re.compile(
    r"<\|channel\|>(analysis|commentary|final)<\|message\|>(.*?)"
    r"(?:<\|end\|>(?:<\|start\|>assistant(?=<\|channel\|>))?|$)",
    re.DOTALL,
)


def as_message(text: str) -> Message:
    """Return the message of an answer, whose text is without the token that ended it.

    Of channels only what was said to the user is kept: no calls, no header that was broken off.
    """
    if not text.startswith(CHANNEL):
        return {"role": "assistant", "content": text}
    said: dict[bool, list[str]] = {True: [], False: []}
    place = 0
    while part := PART.match(text, place):
        said[part[1] == "analysis"].append(part[2])
        place = part.end()
    message = {"role": "assistant", "content": "\n".join(said[False])}
    if said[True]:
        message["reasoning_content"] = "\n".join(said[True])
    return message
