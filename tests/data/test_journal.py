from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specforge_core.data.journal import Journal
from specforge_core.errors import DataError


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writing more is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": 1, "text": "ünï\n"}, {"id": 2}])
        journal.append([])
        assert [row["id"] for row in journal.rows()] == [1, 2]
    with Journal(path) as journal:
        journal.append([{"id": 3}])
        assert [row["id"] for row in journal.rows()] == [1, 2, 3]
    assert "ünï" in path.read_text(encoding="utf-8")


def test_half_written_line_is_cut_wherever_it_tore(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = [json.dumps({"id": i, "text": "é" * 40_000 * i}, ensure_ascii=False) for i in (0, 1, 2)]
    data = "".join(line + "\n" for line in whole).encode()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[2] - 1, ends[2]):
        path.write_bytes(data[:cut])
        with Journal(path) as journal:
            assert len(list(journal.rows())) == sum(end <= cut for end in ends)
            journal.append([{"id": "next"}])
            assert [row["id"] for row in journal.rows()][-1] == "next"


def test_full_disk_writes_the_whole_append_or_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": 1}])
        with disk_of(4096), pytest.raises(DataError) as error:
            journal.append([{"id": 2}, {"id": 3, "text": "x" * 8192}])
        assert [row["id"] for row in journal.rows()] == [1]
        journal.append([{"id": 2}])
        assert [row["id"] for row in journal.rows()] == [1, 2]
    assert f"output {path} cannot be written: File too large" in str(error.value)
    assert "run the same command to go on" in str(error.value)


def test_output_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file cannot be written: Not a directory"):
        Journal(tmp_path / "file" / "j.jsonl")
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        Journal(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": 1}])
        with pytest.raises(DataError, match=r"another process is writing .*j\.jsonl"):
            Journal(path)
    with Journal(path) as journal:
        assert [row["id"] for row in journal.rows()] == [1]


@pytest.mark.parametrize(
    "text", ["dear diary\n", "dear diary", '{"id": 1}\n{"text": 1}\n{"id": 2}', "[1]"]
)
def test_foreign_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with (
        pytest.raises(DataError, match=r"notes\.txt:\d is no row of this command"),
        Journal(path) as journal,
    ):
        list(journal.rows())
    assert path.read_text() == text


def test_unused_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append([{"id": 1}])
        journal.clear()
    assert not list(tmp_path.iterdir())


def test_what_utf8_cannot_hold_comes_back_as_it_was(tmp_path: Path) -> None:
    row = {"id": "a\ud800", "text": "\udfff and 漢字", "deep": [{"k\ud83d": 1}]}
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append([{"id": 1}, row])
        assert list(journal.rows()) == [{"id": 1}, row]


def test_a_device_or_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/full"), Path("/dev/null")):
        with pytest.raises(DataError, match="is a device or a pipe"):
            Journal(path)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        Journal(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_name_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"lines of JSON are written\. Try: -o a\.jsonl$"):
        Journal(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
