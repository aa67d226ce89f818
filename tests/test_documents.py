"""Documents of JSON: each key once, or which is there twice, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data import sources
from specforge_core.data.files import open_source
from specforge_core.data.sources import read_conversations
from specforge_core.documents import KeyTwice, parse_json, read_object
from specforge_core.errors import DataError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1,\n"a": 2}', (1, 2)),
        ('{\n"b": {"a": "}\\"{"},\n"a": 1, "c": [{"a": 1}],\n\n"\\u0061": 2}', (3, 5)),
        ('[{"a": 1}, {"x": {"a": 1,\n "a": 2}}]', (1, 2)),
    ],
)
def test_a_key_twice_is_found(tmp_path: Path, text: str, lines: tuple[int, int]) -> None:
    with pytest.raises(KeyTwice) as error:
        parse_json(text.encode())
    assert (error.value.key, error.value.lines) == ("a", lines)
    (tmp_path / "d.json").write_text(text, encoding="utf-16")
    with pytest.raises(
        ValueError, match=rf"'a' is there twice \(lines {lines[0]} and {lines[1]}\)"
    ):
        read_object(tmp_path / "d.json")


def test_a_key_that_says_the_same_twice_hides_nothing() -> None:
    assert parse_json(b'{"a": [1], "b": 2, "a": [1]}') == {"a": [1], "b": 2}


@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_a_key_twice_in_an_array_is_an_error_of_its_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    first = json.dumps({"id": "a", "messages": TALK}, indent=1)
    monkeypatch.setattr(sources, "PIECE", piece)
    path = tmp_path / "d.json"
    torn = '{"id": "}{",\n"messages": [{"role": "user", "\\u0072ole": "gpt",\n"content": "}"}]}'
    path.write_text(f"\n[\n{first},\n\n{torn},\n{json.dumps({'id': 'c', 'messages': TALK})}]")
    lines = len(first.splitlines())
    where = (
        rf"d\.json:2: the key 'role' is there twice \(lines {lines + 5} and {lines + 5}\)\. Corr"
    )

    def read(**options: Any) -> list[Any]:
        found = read_conversations(
            [str(path)], DataConfig(**options), lambda name, _: open_source(name)
        )
        return [one.row["id"] for one in found]

    with pytest.raises(DataError, match=where):
        read()
    assert read(on_error="skip") == ["a", "c"]
