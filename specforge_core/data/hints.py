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
            asked = f".{question}"
            if question == "instruction" and row.get("input"):
                asked = '(.instruction + "\\n\\n" + (.input // ""))'
            said = f'{{role: "user", content: {asked}}}, {{role: "assistant", content: .{answer}}}'
            return f"Try: jq -c '{{messages: [{said}]}}' FILE > FILE.jsonl"
    if isinstance(row.get("chosen"), list):  # beside one that is rejected
        return "Answers that were preferred? Try: jq -c '{messages: .chosen}' FILE > FILE.jsonl"
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and any(chat in first for chat in CHATS):
            return f"Try: jq -c '.[{_spelled(name)}][]' FILE > FILE.jsonl"
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return "One message. A list of them a line? Try: jq -c '{messages: .}' FILE > FILE.jsonl"
    return None


def _spelled(name: str) -> str:
    """Return a key as jq spells it, within the quotes of a shell."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")
    return f'"{escaped}"'
