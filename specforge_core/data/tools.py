"""Tools of a row and calls of them, in OpenAI's form, from all the forms that data has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from reprlib import Repr
from typing import Any, TypeAlias

Tool: TypeAlias = Mapping[str, Any]

CALL = ("id", "type", "index", "name", "arguments")  # what a call, or its function, has

_short = Repr()  # values in messages: whatever a row holds, and however deep it is
_short.maxother = _short.maxstring = _short.maxlong = 80
shown = _short.repr


def tools_of(row: Mapping[str, Any]) -> Iterator[Tool]:
    """Yield the tools of a row in OpenAI's form; older data has `functions`, or a text of JSON."""
    found = row.get("tools", row.get("functions"))
    if found is None:
        return
    if isinstance(found, str):
        found = _json(found, "the row's 'tools'")
    if not isinstance(found, list):
        raise ValueError(f"the row's 'tools' must be a list, found {shown(found)}")
    for tool in found:
        if isinstance(tool, str):
            tool = _json(tool, "one of the row's 'tools'")
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool must be a function with a name, found {shown(tool)}")
        flat = function is tool and function.get("type") == "function"  # as newer APIs have it
        named = {k: v for k, v in function.items() if not (flat and k == "type")}
        yield _spelled({"type": "function", "function": named}, "a tool")


def calls_of(turn: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """Yield the calls of a message in OpenAI's form.  Raises ValueError."""
    calls = turn.get("tool_calls", [])
    if isinstance(calls, str):
        calls = _json(calls, f"message {number}: 'tool_calls'")
    if not isinstance(calls, list):
        raise ValueError(f"message {number}: 'tool_calls' must be a list, {shown(calls)}")
    for call in calls:
        yield _call(call, number)
    if "function_call" in turn:
        yield _call(turn["function_call"], number)


def called_in(content: object, number: int) -> Iterator[dict[str, Any]]:
    """Yield the calls that are a message's text."""
    found = _json(content, f"message {number}") if isinstance(content, str) else content
    for call in found if isinstance(found, list) else [found]:
        yield _call(call, number)


def _call(call: object, number: int) -> dict[str, Any]:
    """Return a call in OpenAI's form, its arguments an object: so servers pass them on."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"message {number}: a call must have a name and arguments, found {shown(call)}"
        )
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
        if others := sorted(k for k in function if k not in CALL and function[k]):
            raise ValueError(
                f"message {number}: a call has {', '.join(map(repr, others))[:200]} and no "
                "'arguments', which is what they must be called"
            )
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"message {number}: the arguments of a call")
    if not isinstance(arguments, dict):
        raise ValueError(
            f"message {number}: the arguments of a call must be an object, found {shown(arguments)}"
        )
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call, dict) and call.get("id") is not None:
        made = {"id": str(call["id"]), **made}
    return _spelled(made, f"message {number}: a call")


def _spelled(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a value that JSON and UTF-8 can spell, as templates and tokenizers have to."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"{what} cannot be written as JSON ({exc})") from exc
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{what} must be JSON ({exc})") from exc
