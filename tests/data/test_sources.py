from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data import sources
from specforge_core.data.files import open_source
from specforge_core.data.messages import REASONING
from specforge_core.data.sources import (
    Conversation,
    Rows,
    Skipped,
    read_conversations,
)
from specforge_core.errors import DataError

OPENAI = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ],
}
SHAREGPT = {
    "id": "b",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
}


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def with_text(text: object) -> dict[str, Any]:
    """Return a conversation whose answer is one part with such a text."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return {"messages": [{"role": "user", "content": "Hi"}, answer]}


def jsonl(source: str, data: DataConfig) -> Any:
    return open_source(source)


def read(
    path: Path, rows: Rows = jsonl, *, on_error: Any = "raise", **options: Any
) -> list[Conversation]:
    data = DataConfig(on_error=on_error)
    return list(read_conversations([str(path)], data, rows, **options))


def test_both_formats_become_openai_messages(tmp_path: Path) -> None:
    mixed = {
        "conversations": [
            {"role": "user", "content": [{"type": "text", "text": "1"}, {"text": "2"}]},
            {"role": "assistant", "content": "x", "reasoning_content": "why", "name": "bot"},
        ]
    }
    first, second, third = read(write(tmp_path / "d.jsonl", OPENAI, "", SHAREGPT, mixed))

    assert list(first.messages) == OPENAI["messages"]
    assert second.messages == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    )
    assert third.messages == (
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": "x", "name": "bot", **dict.fromkeys(REASONING, "why")},
    )
    assert [c.where for c in (first, second)] == ["d.jsonl:1", "d.jsonl:3"]
    assert first.row["id"] == "a"


CHAT = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}],
}
TURNS = json.dumps(CHAT["messages"], ensure_ascii=False)


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "hi", "completion": "hé"}',
        '{"instruction": "hi", "output": "hé", "input": ""}',
        '{"question": "hi", "answer": "hé"}\n{"question": "hi", "answer": "hé"}',
        f'{{"chosen": {TURNS}, "rejected": []}}',
        f'{{"custom_id": "1", "body": {json.dumps(CHAT, ensure_ascii=False)}}}',
        f'{{"version": 2, "it\'s": [{json.dumps(CHAT, ensure_ascii=False)}]}}',
        f"{json.dumps(CHAT)},\n{json.dumps(CHAT)}\n",
        json.dumps(CHAT, indent=1),
        f"{TURNS}\n{TURNS}\n",
        f"{json.dumps(CHAT)} {json.dumps(CHAT)}\n",
        pytest.param(json.dumps(CHAT, ensure_ascii=False).encode("latin-1"), id="latin-1"),
    ],
)
def test_the_advised_command_makes_rows_of_what_is_nearly_some(
    tmp_path: Path, text: str | bytes
) -> None:
    path = tmp_path / "FILE"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        read(path)
    command = str(error.value).partition("Try: ")[2]
    assert command, str(error.value)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    found = read(tmp_path / "FILE.jsonl")
    assert found
    assert all(list(one.messages) == CHAT["messages"] for one in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "d.jsonl:2 is not a line of JSON"),
        ('[{"messages": []}]', "d.jsonl:2: expected an object, found list"),
        ('{"text": "hello"}', "needs a list 'messages' or 'conversations', has the keys 'text'"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "d.jsonl:2: message 1 has the role 'narrator'; known are assistant, bard",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "must be text, found None"),
        ({"messages": ["hello"]}, "message 1 is not an object: 'hello'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "part of type 'image_url'; only text is supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "message 1: a call must have a name and arguments, found {}",
        ),
        ({"tools": [{}], "messages": []}, "a tool must be a function with a name, found {}"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "is not valid Unicode"),
        ("[" * 100_000, "d.jsonl:2 is JSON nested too deeply to be read"),
        ('{"a": ' + "[" * 100_000, "d.jsonl:2 is JSON nested too deeply to be read"),
        ('{"id": ' + "1" * 5000 + "}", "d.jsonl:2 is not a line of JSON"),
        ('{"messages": [], "messages": [{}]}', "(the key 'messages' is there twice)"),
        (
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "is not a line of JSON (the key 'content' is there twice)",
        ),
        ({**OPENAI, "tokens": {"input_ids": [1]}}, "the row has 'tokens', which is not used"),
        ({**OPENAI, "token_ids": [1]}, "the row has 'token_ids', which is not used"),
        (with_text({"a": 1}), "the text of a message's part must be text, found {'a': 1}"),
        (with_text(None), "the text of a message's part must be text, found None"),
        (with_text(3), "the text of a message's part must be text, found 3"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has the role ['user']"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text, found 3"),
        ({"messages": [{"role": "user"}]}, "content must be text, found None"),
        ({"messages": {"role": "user"}}, "needs a list 'messages'"),
        ({"messages": None}, "needs a list 'messages'"),
        (
            {"conversations": {"role": ["user", "assistant"], "content": ["q", "a"]}},
            "needs a list 'messages' of objects, found {'content': ['q', 'a'], 'role': ['user'",
        ),
        ("\0" * 64, "d.jsonl:2 is not a line of JSON (Expecting value"),
        ("3", "d.jsonl:2: expected an object, found int"),
        ("null", "d.jsonl:2: expected an object, found NoneType"),
        ({"messages": OPENAI["messages"][:2]}, "has no assistant turn, so nothing to train on"),
    ],
)
def test_bad_line_is_named_or_skipped(
    tmp_path: Path, line: str | dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "d.jsonl", OPENAI, line, SHAREGPT)

    with pytest.raises(DataError) as error:
        read(path)

    assert message in str(error.value)
    assert "d.jsonl:2" in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    assert [c.row["id"] for c in read(path, on_error="skip")] == ["a", "b"]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:1 is not a line of JSON"):
        read(path)


def test_prompts_need_a_user_turn_only(tmp_path: Path) -> None:
    prompt = {"messages": [{"role": "user", "content": "Hi"}]}
    path = write(tmp_path / "d.jsonl", prompt)
    assert len(read(path, need_answer=False)) == 1

    path = write(tmp_path / "d.jsonl", {"messages": [{"role": "system", "content": "Hi"}]})
    with pytest.raises(DataError, match=r"d\.jsonl:1: the conversation has no user turn to answer"):
        read(path, need_answer=False)


def test_missing_file_stops_before_the_first_line(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", OPENAI)
    with pytest.raises(DataError, match=r"missing\.jsonl' does not exist\. .*correct it in the"):
        next(
            read_conversations(
                [str(good), str(tmp_path / "missing.jsonl")], DataConfig(on_error="skip"), jsonl
            )
        )


def test_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no conversations in .*d\.jsonl: write one JSON object"):
        read(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(DataError, match=r"every conversation .* was skipped, .*d\.jsonl:1 is not"):
        read(write(tmp_path / "d.jsonl", "{", "}"), on_error="skip")


def test_rows_of_another_kind_of_source_are_read_alike_and_named_by_their_place() -> None:
    asked: list[str] = []

    def rows(source: str, data: DataConfig) -> Any:
        asked.append(source)
        bad: dict[str, Any] = {"messages": 3}
        return iter([OPENAI, DataError(f"{source}:2 is torn"), bad, SHAREGPT])

    found = list(read_conversations(["hub:a", "hub:b"], DataConfig(on_error="skip"), rows))
    assert asked == ["hub:a", "hub:b"]
    assert [c.where for c in found] == ["hub:a:1", "hub:a:4", "hub:b:1", "hub:b:4"]
    assert [list(c.messages) for c in found[::2]] == [OPENAI["messages"]] * 2
    with pytest.raises(DataError, match="hub:a:2 is torn"):
        list(read_conversations(["hub:a"], DataConfig(), rows))


def test_what_a_message_holds_is_shown_in_short(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    for content in ({"k": "v" * 100_000}, [["x"] * 100_000], deep, 10**3000):
        row = {"messages": [{"role": "user", "content": content}]}
        for bad in (row, {"messages": [content]}, {"x" * 100_000: content}):
            with pytest.raises(DataError) as error:
                read(write(tmp_path / "d.jsonl", bad))
            assert len(str(error.value)) < 500


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    path = write(tmp_path / "d.jsonl", OPENAI, json.dumps({"x": "y" * 4000}), SHAREGPT, "x" * 2000)
    with pytest.raises(DataError, match=r"d\.jsonl:2 is longer than 1,000 bytes\."):
        read(path)
    found = read(path, on_error="skip")
    assert [(c.row["id"], c.where) for c in found] == [("a", "d.jsonl:1"), ("b", "d.jsonl:3")]


def test_a_key_that_says_the_same_twice_hides_nothing(tmp_path: Path) -> None:
    (found,) = read(write(tmp_path / "d.jsonl", json.dumps(OPENAI)[:-1] + ', "id": "a"}'))
    assert found.row == OPENAI


def test_what_was_skipped_is_counted_by_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "{", OPENAI, "[1]", {"messages": 1}, "}", SHAREGPT)
    skipped = Skipped("skip")
    data = DataConfig(on_error="skip")
    assert len(list(read_conversations([str(path)], data, jsonl, skipped=skipped))) == 2
    assert skipped.counts == {"not JSON": 2, "not a conversation": 2}
    assert str(skipped) == "4 rows skipped (2 not JSON, 2 not a conversation)"
    assert "d.jsonl:1 is not a line of JSON" in str(skipped.first)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "d.jsonl", OPENAI, "{")
    paths = [str(tmp_path / folder / "d.jsonl") for folder in ("a", "b")]
    found = list(read_conversations(paths, DataConfig(on_error="skip"), jsonl))
    assert [c.where for c in found] == [f"{path}:1" for path in paths]
    with pytest.raises(DataError, match=r"a/d\.jsonl:2 is not a line of JSON"):
        list(read_conversations(paths, DataConfig(), jsonl))


def test_a_pipe_is_no_file_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no regular file"):
        read(tmp_path / "pipe")
