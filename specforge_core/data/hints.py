"""What to do about lines and rows that are nearly what is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .messages import CHATS

SKIP = "Correct the line, or set data.on_error=skip"
# what one question and its answer are called
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
)

BESIDE = ("input", "context")  # what a question is about
QUESTIONS = ("prompt", "prompts", "turns", "question", "instruction", "query")  # to be answered
MESSAGE = ({"role", "content"}, {"from", "value"})


def of_line(line: bytes, exc: ValueError) -> str:
    """Return what to do about a line that is no JSON."""
    if line.rstrip() == b"{":
        return "One object on several lines? Try: jq -c . FILE > FILE.jsonl"
    if isinstance(exc, UnicodeDecodeError):
        other = "iconv -f ISO-8859-1 -t UTF-8 FILE > FILE.jsonl"
        return f"{SKIP}. All of the file in another code? Try: {other}"
    if line.rstrip().endswith(b"},"):
        return "A comma behind each object? Try: sed 's/,[[:space:]]*$//' FILE > FILE.jsonl"
    if isinstance(exc, json.JSONDecodeError) and exc.msg == "Extra data":
        return "Several objects on a line? Try: jq -c . FILE > FILE.jsonl"
    return SKIP


def of_row(row: Mapping[str, Any]) -> str | None:
    """Return how a row without messages becomes one, if it looks like rows that are known."""
    if any(chat in row for chat in CHATS):
        return None
    for question, answer in PAIRS:
        if all(isinstance(row.get(key), list) for key in (question, answer)):
            return f"Try: jq -c '{{messages: (.{question} + .{answer})}}' FILE > FILE.jsonl"
        if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            asked, more = f".{question}", [n for n in BESIDE if n in row and n != question]
            if more:  # not in every row, as in the first one perhaps
                parts = f"[{', '.join(f'.{name}' for name in (question, *more))}]"
                asked = f'({parts} | map(select(. != null and . != "")) | join("\\n\\n"))'
            said = f'{{role: "user", content: {asked}}}, {{role: "assistant", content: .{answer}}}'
            return f"Try: jq -c '{{messages: [{said}]}}' FILE > FILE.jsonl"
    for name, value in sorted(row.items(), key=lambda item: item[0] == "rejected"):
        if isinstance(value, Mapping) and any(chat in value for chat in CHATS):
            return f"Try: jq -c '.[{_spelled(name)}]' FILE > FILE.jsonl"
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and any(chat in first for chat in CHATS):
            return f"Try: jq -c '.[{_spelled(name)}][]' FILE > FILE.jsonl"
        if isinstance(first, Mapping) and any(keys <= first.keys() for keys in MESSAGE):
            return f"Try: jq -c '{{messages: .[{_spelled(name)}]}}' FILE > FILE.jsonl"
    if any(keys <= row.keys() for keys in MESSAGE):
        return "One message. A list of them a line? Try: jq -c '{messages: .}' FILE > FILE.jsonl"
    for name in QUESTIONS:
        given, ask = row.get(name), '{role: "user", content: .}'
        if isinstance(given, str):
            return f"Try: jq -c '{{messages: [.{name} | {ask}]}}' FILE > FILE.jsonl"
        if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
            return f"Try: jq -c '{{messages: [.{name}[] | {ask}]}}' FILE > FILE.jsonl"
    return None


def _spelled(name: str) -> str:
    """Return a key as jq spells it, within the quotes of a shell."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")
    return f'"{escaped}"'
