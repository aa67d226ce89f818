"""The same rows in every kind of file that is read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data.files import open_source
from specforge_core.data.sources import Conversation, read_conversations

pyarrow = pytest.importorskip("pyarrow", reason="of the extra `datasets`")
parquet = pytest.importorskip("pyarrow.parquet", reason="of the extra `datasets`")
zstandard = pytest.importorskip("zstandard", reason="of the extra `datasets`")

ROWS = [
    {
        "id": str(number),
        "messages": [
            {"role": "user", "content": f"Ünïcödé {number}"},
            {"role": "assistant", "content": "a"},
        ],
    }
    for number in range(700)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()


def table() -> Any:
    return pyarrow.Table.from_pylist(ROWS)


def in_memory(write: Callable[[Any], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def arrow_stream(stream: Any) -> None:
    with pyarrow.ipc.new_stream(stream, table().schema) as writer:
        writer.write_table(table(), max_chunksize=300)


def arrow_file(stream: Any) -> None:
    with pyarrow.ipc.new_file(stream, table().schema) as writer:
        writer.write_table(table(), max_chunksize=300)


FILES: dict[str, Callable[[], bytes]] = {
    "d.jsonl": lambda: LINES,
    "marked.jsonl": lambda: b"\xef\xbb\xbf" + LINES,
    "d.jsonl.gz": lambda: gzip.compress(LINES, mtime=0),
    "d.jsonl.zst": lambda: zstandard.compress(LINES),
    "two.jsonl.zst": lambda: zstandard.compress(LINES[:1000]) + zstandard.compress(LINES[1000:]),
    "d.jsonl.bz2": lambda: bz2.compress(LINES),
    "d.jsonl.xz": lambda: lzma.compress(LINES),
    "d.json": lambda: ARRAY,
    "pretty.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "marked.json": lambda: b"\xef\xbb\xbf\n" + ARRAY + b"\n",
    "d.json.gz": lambda: gzip.compress(ARRAY, mtime=0),
    "d.parquet": lambda: in_memory(lambda file: parquet.write_table(table(), file)),
    "stream.arrow": lambda: in_memory(arrow_stream),
    "file.arrow": lambda: in_memory(arrow_file),
    "no-ending": lambda: LINES,
    "wrong.txt": lambda: LINES,
}


def read(*names: object, **options: Any) -> list[Conversation]:
    data = DataConfig(train=tuple(map(str, names)), **options)
    return list(read_conversations(data.train, data, lambda source, data: open_source(source)))


def ids(found: list[Conversation]) -> list[str]:
    return [str(conversation.row["id"]) for conversation in found]
