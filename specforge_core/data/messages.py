"""From a row of data to messages as a server gives them to the chat template.

Rows come in OpenAI's form (`messages`, with tools and their calls) and in ShareGPT's
(`conversations`), old and new.  What carries meaning is used or refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
READ = {
    *("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call"),
    *(*REASONING, "weight", "train"),
}
# of a message, and nothing that a target reads or writes
NOTES = {
    *("id", "index", "model", "timestamp", "created", "created_at", "date", "language", "lang"),
    *("source", "usage", "finish_reason", "stop_reason", "token_count", "num_tokens"),
}
# of a row of tokens, too: what is trained on, and what no text holds
BESIDE = (
    *("weight", "train", "loss", "loss_weight", "mask"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
# of a row, where any other name is taken for a note: what somebody meant to be trained on
MEANT = (
    *("system_prompt", "instruction", "input", "output", "prompt", "response", "completion"),
    *("history", "chosen", "rejected", "rejected_response", "system_message", "function_call"),
    *("documents", "tool_choice", "response_format", "chat_template_kwargs", "tool_calls"),
    *(*REASONING, "labels", "input_ids", "loss_mask", *BESIDE),
)
PART = {"type", "text", "annotations", "cache_control", "citations", "id", "index"}  # of a text
# of a row: how its own prompt is rendered, or that its answer is a bad one, whatever they say
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "chat_template_kwargs")
TOKENS = ("tokens", "token_ids")  # where they are no count: what somebody meant to be trained on
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
    turns = chat_of(row)
    if isinstance(turns, str):
        raise ValueError(
            "the messages are one text. If that is JSON: jq -c "
            "'(.messages, .conversations | strings) |= fromjson' FILE > FILE.jsonl"
        )
    if turns is not None and not isinstance(turns, list):
        raise ValueError(f"needs a list 'messages' of objects, found {shown(turns)}")
    if turns is None:
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
    unused += [key for key in TOKENS if isinstance(row.get(key), list | Mapping)]
    unused += [key for key in SWITCHES if key in row and key not in unused]
    unused += [key for key in BAD if row.get(key) is False]
    if all(row.get(key) for key in CHATS) and not _alike(*(row[key] for key in CHATS)):
        unused.append(CHATS[1])
    if unused:
        raise ValueError(_unused("the row", unused))
    return Parsed(tuple(_with_system(row.get("system"), messages)), tuple(tools_of(row)))


def chat_of(row: Mapping[str, Any]) -> Any:
    """Return a row's conversation, wherever it is: a table has both columns in every row."""
    found = [row[key] for key in CHATS if row.get(key) is not None]
    return next((chat for chat in found if chat != []), next(iter(found), None))


def tokens_alone(row: Mapping[str, Any], ignored: Iterable[str] = ()) -> bool:
    """Say whether a row is tokens and no conversation.

    Raises ValueError where it is, and something beside them says more than they and their mask do.
    """
    if row.get("input_ids") is None or chat_of(row) is not None:
        return False
    row = _without(row, ignored)
    ids, mask = row.get("input_ids"), row.get("loss_mask")
    if not isinstance(ids, list) or not isinstance(mask, list):
        return True  # said where they are read
    plain = {
        "attention_mask": [1] * len(ids),
        "position_ids": [*range(len(ids))],
        "labels": [token if on else -100 for token, on in zip(ids, mask, strict=False)],
    }
    unused = [k for k in (*plain, *BESIDE) if k in row and row[k] != plain.get(k, 1)]
    if unused:
        raise ValueError(_unused("the row of tokens", unused))
    return True


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
    given = _one(turn, "role", "from", number)
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(
            f"message {number} has the role {shown(given)}; known are {', '.join(sorted(ROLES))}"
        )
    if unknown := sorted(map(str, turn.keys() - READ - NOTES)):
        raise ValueError(_unused(f"message {number}", unknown))
    role = ROLES[given]
    content = _one(turn, "content", "value", number)
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


def _one(turn: Mapping[str, Any], name: str, other: str, number: int) -> Any:
    """Return what a message has under one of two names.  Raises ValueError where they differ."""
    found = [turn[key] for key in (name, other) if turn.get(key) is not None]
    if len(found) == 2 and found[0] != found[1]:
        same = name == "role" and ROLES.get(str(found[0])) == ROLES.get(str(found[1]))
        if not same:
            raise ValueError(f"message {number}: {name!r} and {other!r} differ")
    return found[0] if found else None


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
    text = part.get("text", "" if part.get("type") else None)
    beside = sorted(k for k in part.keys() - PART if part[k] not in (None, "", False, [], {}))
    if beside:
        named = ", ".join(map(repr, beside[:20]))
        raise ValueError(f"a message has a part with {named:.200}; only text is supported")
    if not isinstance(text, str):
        raise ValueError(f"the text of a message's part must be text, found {shown(text)}")
    return text
