"""From a row of data to messages as a server gives them to the chat template.

Rows come in OpenAI's form (`messages`, with tools and their calls) and in ShareGPT's
(`conversations`), old and new.  What carries meaning is used or refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .tools import Tool, called_in, calls_of, shown, tools_of

# "role", "content"; where there are some "tool_calls", "tool_call_id", "name" and REASONING
Message: TypeAlias = dict[str, Any]

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
    "function_call": "assistant",  # ShareGPT: the text is the call
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is a call
# one thing under the names by which templates read it: a message has all of them
REASONING = ("reasoning_content", "reasoning", "thinking")
ALIASES = {
    "tools": ("tools", "functions"),
    "tool_calls": ("tool_calls", "function_call"),
    REASONING[0]: REASONING,
}
READ = {
    *("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call"),
    *(*REASONING, "weight", "train"),
}
# of a message, and nothing that a target reads or writes
NOTES = {
    *("id", "index", "model", "timestamp", "created", "created_at", "date", "language", "lang"),
    *("source", "usage", "finish_reason", "stop_reason", "token_count", "num_tokens"),
}
# of a row, where any other name is taken for a note: what somebody meant to be trained on
MEANT = (
    *("system_prompt", "instruction", "input", "output", "prompt", "response", "completion"),
    *("history", "chosen", "rejected", "image", "images", "video", "videos", "audio", "audios"),
    *("documents", "tool_choice", "response_format", "chat_template_kwargs", "tool_calls"),
    *(*REASONING, "weight", "train", "labels", "input_ids", "loss_mask"),
)
# of a row: how its own prompt is rendered, or that its answer is a bad one, whatever they say
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "chat_template_kwargs")
BAD = ("label", "is_correct", "correct")  # where they are false

CHATS = ("messages", "conversations")
KEPT = (*CHATS, "content", "value")  # an empty one says something


class OnlyRead(dict[str, Any]):
    """A message of the assistant that is not trained on."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a row says."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]  # in OpenAI's form


def parse(row: object, ignored: Iterable[str] = ()) -> Parsed:
    """Read a row without the fields `ignored`, of its messages neither.  Raises ValueError."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    row = _without(row, ignored)
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"needs a list 'messages' or 'conversations', has the keys {keys:.200}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"message {number} is not an object: {shown(turn)}")
        turn = _without(turn, ignored)
        message = _message(turn, number)
        trained = _trained(turn, message["role"], number)
        messages.append(message if trained else OnlyRead(message))
    contents = {message["content"] for message in messages}
    unused = [key for key in MEANT if key in row and _says(row[key], contents)]
    unused += [key for key in SWITCHES if key in row and key not in unused]
    unused += [key for key in BAD if row.get(key) is False]
    if all(row.get(key) for key in CHATS) and not _alike(*(row[key] for key in CHATS)):
        unused.append(CHATS[1])
    if unused:
        raise ValueError(_unused("the row", unused))
    return Parsed(tuple(_with_system(row.get("system"), messages)), tuple(tools_of(row)))


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
    turns = row.get("messages", row.get("conversations"))
    parts = [row, *(turn for turn in turns if isinstance(turn, Mapping))] if turns else [row]
    return [alias for alias in ALIASES[name] if any(alias in part for part in parts)] or [name]


def _without(row: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, Any]:
    """Drop what is ignored, and what holds nothing: tables have every column in every row."""
    empty: tuple[Any, ...] = (None, "", [], {})
    return {
        key: value
        for key, value in row.items()
        if key not in ignored and (key in KEPT or value not in empty)
    }


def _says(value: object, contents: set[str]) -> bool:
    """Say whether a field of a row holds more than a copy of one of its messages."""
    return value not in (1, True) and not (isinstance(value, str) and value in contents)


def _alike(messages: object, conversations: object) -> bool:
    """Say whether a row's two chats are one: the same texts in the same order."""

    def texts(chat: object) -> list[object]:
        turns = [turn for turn in chat if isinstance(turn, dict)] if isinstance(chat, list) else []
        return [turn.get("content", turn.get("value")) for turn in turns]

    return texts(messages) == texts(conversations)


def _unused(what: str, names: Iterable[str]) -> str:
    listed = [f"{name:.40}" for name in names][:20]
    return (
        f"{what} has {', '.join(map(repr, listed))}, which is not used. If it means nothing for "
        f"the training: data.ignore_fields=[{', '.join(listed)}]"
    )


def _with_system(system: object, messages: list[Message]) -> list[Message]:
    if system is None:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") == "system":
        raise ValueError(
            "the row has a 'system' and its messages begin with one. Take one of them out, or "
            "leave the first out: data.ignore_fields=[system]"
        )
    return [{"role": "system", "content": _text(system)}, *messages]


def _message(turn: Mapping[str, Any], number: int) -> Message:
    given = turn.get("role", turn.get("from"))
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(
            f"message {number} has the role {shown(given)}; known are {', '.join(sorted(ROLES))}"
        )
    if unknown := sorted(map(str, turn.keys() - READ - NOTES)):
        raise ValueError(_unused(f"message {number}", unknown))
    role = ROLES[given]
    content = turn.get("content", turn.get("value"))
    calls = list(calls_of(turn, number))
    if given in CALLS:
        calls, content = list(called_in(content, number)), ""
    if calls and role != "assistant":
        raise ValueError(f"message {number} calls tools, and is of the role {given!r}")
    # where a call stands for the answer, servers give the template an empty text
    message: Message = {
        "role": role,
        "content": "" if calls and content is None else _text(content),
    }
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if name in turn:
            message[name] = _text(turn[name])
    return message | _reasoning(turn, role, number)


def _reasoning(turn: Mapping[str, Any], role: str, number: int) -> dict[str, str]:
    texts = {name: _text(turn[name]) for name in REASONING if name in turn}
    if not texts:
        return {}
    if role != "assistant":
        raise ValueError(f"message {number} has {next(iter(texts))!r}, and is no assistant's")
    if len(set(texts.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(map(repr, texts))} differ")
    return dict.fromkeys(REASONING, next(iter(texts.values())))


def _trained(turn: Mapping[str, Any], role: str, number: int) -> bool:
    """Say whether a message is trained on; OpenAI's `weight` and `train` say so of answers."""
    for name in ("weight", "train"):
        if (value := turn.get(name)) is None:
            continue
        if value not in (0, 1):
            raise ValueError(
                f"message {number} has {name!r}: {shown(value)}; it is trained on (1, true) "
                "or not (0, false)"
            )
        if not value:
            return False
        if name == "train" and role != "assistant":
            raise ValueError(
                f"message {number} has 'train': true, and is no assistant's: only what the target "
                "writes is trained on. Or leave it out: data.ignore_fields=[train]"
            )
    return True


def _text(content: object) -> str:
    """Return a message's text, of OpenAI's list of parts too."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise ValueError(f"a message's content must be text, found {shown(content)}")
    try:
        content.encode()
    except UnicodeEncodeError as exc:  # half a surrogate pair, which tokenizers refuse
        raise ValueError(f"a message is not valid Unicode ({exc})") from exc
    return content


def _part(part: Mapping[str, object]) -> str:
    if part.get("type", "text") != "text":
        kind = shown(part["type"])
        raise ValueError(f"a message has a part of type {kind}; only text is supported")
    text = part.get("text", "")
    if not isinstance(text, str):
        raise ValueError(f"the text of a message's part must be text, found {shown(text)}")
    return text
