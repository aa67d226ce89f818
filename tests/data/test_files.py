"""What `data.train` may name, and what is said of everything else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig, RunConfig
from specforge_core.data import sources
from specforge_core.data.files import open_source
from specforge_core.data.sources import Conversation
from specforge_core.errors import DataError

from .rows_in_files import ARRAY, FILES, LINES, ROWS, ids, in_memory, read

zstandard = pytest.importorskip("zstandard", reason="of the extra `datasets`")
datasets = pytest.importorskip("datasets", reason="of the extra `datasets`")


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_the_same_rows(
    tmp_path: Path, name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", piece)
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    found = read(path)
    assert ids(found) == [row["id"] for row in ROWS]
    assert [list(one.messages) for one in found] == [row["messages"] for row in ROWS]
    assert [found[0].where, found[-1].where] == [f"{name}:1", f"{name}:700"]


def archive() -> bytes:
    def write(stream: Any) -> None:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            info = tarfile.TarInfo("d.jsonl")
            info.size = len(LINES)
            tar.addfile(info, io.BytesIO(LINES))

    return in_memory(write)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("d.zip", b"PK\x03\x04xxxx", "a zip archive or a spreadsheet, and no file of rows. Try:"),
        ("d.csv", b"a,b\n1,2\n", "a table of text, and no file of rows. Try: python -c"),
        ("d.tsv", b"a\tb\n1\t2\n", "sep="),
        ("d.txt", b"hello\n", "plain text"),
        ("d.yaml", b"- messages: []\n", "Try: yq -o json"),
        ("d.sqlite", b"SQLite format 3\0", "an SQLite data base"),
        ("d.jsonl", b"<!DOCTYPE html><html>", "a web page"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16, and no file of rows. Try: iconv"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16-le"), "Try: iconv -f UTF-16LE -t UTF-8"),
        (
            "d.jsonl",
            '{"a": 1}'.encode("utf-32"),
            "UTF-32, and no file of rows. Try: iconv -f UTF-32LE",
        ),
        ("d.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0), "a table of text, and no file of rows"),
        ("d.jsonl.gz", gzip.compress(gzip.compress(LINES), mtime=0), "packed twice"),
        ("d.pkl", b"\x80\x04\x95", "a Python pickle"),
        ("d.avro", b"Obj\x01\x04", "a file of Avro, and no file of rows. Try: fastavro"),
        ("d.orc", b"ORC\x08", 'Try: python -c "import pandas; pandas.read_orc('),
        ("d.feather", b"FEA1\0\0", "pandas.read_feather("),
        ("d.jsonl.lz4", b"\x04\x22\x4d\x18", "packed by lz4, and no file of rows. Try: lz4 -d"),
        ("d.7z", b"7z\xbc\xaf\x27\x1c", "an archive, and no file of rows. Try: 7z x"),
        ("d.h5", b"\x89HDF\r\n", "a file of HDF5"),
        ("d.bin", b"\x01\x02\0\0", "of no kind that is known, and no file of rows"),
        ("d.tar", archive(), "an archive"),
        ("d.tar.gz", gzip.compress(archive(), mtime=0), "an archive, packed"),
        ("d.parquet.gz", gzip.compress(b"PAR1", mtime=0), "a table, packed"),
        ("d.parquet", b"PAR1xxxx", "is a damaged table of Parquet"),
        (
            "d.parquet",
            b'{\n "error": "Not found"}',
            "is text, and named as a table, and no file of",
        ),
        (
            "d.parquet",
            b"Entry not found",
            "Try: get the file again; or, if it holds rows of JSON: mv",
        ),
        ("d.Arrow", LINES + b"x" * (5 << 20), "is text, and named as a table"),
        ("d.parquet", b"", "is empty, and named as a table"),
        ("d.arrow", b"ARROW1\0\0xxxx", "is a damaged table of Arrow"),
        ("d.arrow", b"\xff\xff\xff\xff\xff", "is a damaged table of Arrow"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot be read: "),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9] + b"123456789", "cannot be read: "),
        ("d.jsonl.xz", lzma.compress(LINES)[:-20], "cannot be read: "),
        ("d.jsonl.bz2", bz2.compress(LINES)[:-20], "cannot be read: "),
        ("d.jsonl.zst", zstandard.compress(LINES)[:-20], "it ends in the middle"),
        ("d.jsonl.zst", zstandard.compress(LINES) + b"x" * 99, "cannot be read: "),
    ],
)
def test_what_is_no_file_of_rows_is_said_with_a_way_out(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path, on_error="skip")
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"messages": [', "object 1 of the array in d.json is not JSON"),
        (ARRAY[:-1], "object 701 of the array in d.json is not JSON"),
        (ARRAY + b"{}", "more follows behind the array"),
        (b"[" * 100_000, "object 1 of the array"),
        (b'[{"a": 1, "a": 2}, ', "d.json:1: the key 'a' is there twice (lines 1 and 1)"),
        (b'[{"a": 1, "a": 2, ', "object 1 of the array in d.json is not JSON"),
        (b'["x"]', "d.json:1: expected an object, found str"),
        (b"[\xff]", "object 1 of the array"),
        (b"[]", "no conversations in"),
        (b'{\n "messages": []\n}', "One object on several lines? Try: jq -c"),
    ],
)
def test_a_damaged_array(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / "d.json")
    assert message in str(error.value)


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name, rows in (("a/1.jsonl", ROWS[:2]), ("b/c/2.jsonl", ROWS[2:4]), (".x/3.jsonl", ROWS)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "readme.md").write_text("hello")
    expected = ["0", "1", "2", "3"]
    found = read(tmp_path)
    assert ids(found) == expected
    places = [f"{name}.jsonl:{number}" for name in ("a/1", "b/c/2") for number in (1, 2)]
    assert [one.where for one in found] == places
    assert ids(read(tmp_path / "[ab]/**/*.jsonl")) == expected
    assert ids(read(tmp_path / "?/*.jsonl")) == expected[:2]
    with pytest.raises(DataError, match=r"no file has a name like '.*\*\.csv'"):
        read(tmp_path / "*.csv")
    with pytest.raises(DataError, match=r"x\*\*y' is no pattern of names: .*entire path component"):
        read(tmp_path / "x**y")
    (tmp_path / "a/[1].jsonl").write_text(json.dumps(ROWS[9]))
    assert ids(read(tmp_path / "a/[1].jsonl")) == ["9"]  # a file, not a pattern


def test_a_file_that_is_called_like_the_home_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "~nobody-here.jsonl").write_text(json.dumps(ROWS[9]))
    monkeypatch.chdir(tmp_path)
    assert ids(read(Path("~nobody-here.jsonl"))) == ["9"]


def test_names_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_list(ROWS[:3])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("org/chats", "org/chats:test", "org/chats:small:test")
    assert asked == [
        ("org/chats", None, "train"),
        ("org/chats", None, "test"),
        ("org/chats", "small", "test"),
    ]
    assert ids(found) == ["0", "1", "2"] * 3
    assert found[0].where == "org/chats:1"


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Path("/no/such").read_text())
    with pytest.raises(DataError, match=r"'org/chats' is no file here, and cannot be loaded .*Err"):
        read("org/chats")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"'org/chats' is no file here\. .* pip install 'specforge"):
        read("org/chats")
    for address in ("https://x/y.jsonl", "https://x/y.jsonl?download=true", "s3://x/*.jsonl"):
        with pytest.raises(DataError, match=r" is an address, .* Download it"):
            read(address)
    for path in ("data/chats.jsonl", "./chats", "a/b/c", "chats"):
        with pytest.raises(DataError, match=f"data file '{path}' does not exist"):
            read(path)


@pytest.mark.parametrize("name", ["pyarrow", "zstandard"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = "d.parquet" if name == "pyarrow" else "d.jsonl.zst"
    (tmp_path / file).write_bytes(FILES[file]())
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(DataError, match=r"Try: pip install 'specforge-core\[datasets\]'"):
        read(tmp_path / file)


def test_fingerprints_are_of_what_is_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES)
    first = open_source(str(path)).fingerprint()
    (tmp_path / "copy.jsonl").write_bytes(LINES)
    assert open_source(str(tmp_path / "copy.jsonl")).fingerprint() == first
    path.write_bytes(LINES + b"\n")
    assert open_source(str(path)).fingerprint() != first


def test_the_home_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.jsonl").write_bytes(LINES)
    assert len(read("~/d.jsonl")) == len(read("~/*.jsonl")) == len(open_and_read("~/d.jsonl"))
    run = RunConfig.model_validate(
        {
            "target": {"path": "~/t"},
            "strategy": {"name": "x"},
            "data": {"train": "~/d.jsonl", "capture_dir": "~/c"},
            "train": {"init_from": "~/r"},
            "eval": {"prompts": {"a": "~/e"}},
            "regenerate": {"prompts": ["~/p"]},
            "output_dir": "~/o",
        }
    )
    found = [run.target.path, *run.data.train, run.data.capture_dir, run.train.init_from]
    found += [*run.eval.prompts["a"], run.regenerate.prompts[0], run.output_dir]
    assert [str(path) for path in found] == [f"{tmp_path}/{name}" for name in ["t", "d.jsonl"]] + [
        f"{tmp_path}/{name}" for name in "crepo"
    ]
    assert DataConfig(train=("~nobody-of-this-name/x",)).train == ("~nobody-of-this-name/x",)


def open_and_read(source: str) -> list[Any]:
    return list(open_source(source))


def test_sources_are_mixed_in_proportion(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS[:100]), ("b", ROWS[100:200]), ("c", ROWS[200:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("{\n" + text)
    paths = tuple(str(tmp_path / f"{name}.jsonl") for name in "abc")
    data = DataConfig(train=paths, mix=(1, 2, 5), on_error="skip")
    opened = [(path, open_source(path)) for path in paths]
    found = [
        row
        for row in sources.mixed(sources.conversations(opened, data, need_answer=True), data.mix)
        if isinstance(row, Conversation)
    ]
    for end in (8, 80, 160):
        counts = [sum(one.source == path for one in found[:end]) for path in paths]
        assert counts == [end // 8, end // 4, 5 * end // 8]
    assert [sum(one.source == path for one in found) for path in paths] == [50, 100, 252]
    assert ids(found[:8]) == ["200", "201", "100", "202", "203", "0", "101", "204"]


@pytest.mark.parametrize("mix", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 2.0, 3.0)])
def test_wrong_weights(mix: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.mix"):
        DataConfig(train=("a", "b"), mix=mix)
