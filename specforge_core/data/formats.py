"""Rows from a file, whatever it is by its first bytes: JSON lines, an array, a table.

What is no file of rows is named, and how it becomes one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .sources import Line, read_array, read_lines

EXTRA = "pip install 'specforge-core[datasets]'"
ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".arrow"),
    *(f".{kind}.{packed}" for kind in ("jsonl", "json") for packed in ("gz", "zst", "bz2", "xz")),
)
PACKED_NAME = re.compile(r"\.(gz|zst|bz2|xz)$", re.IGNORECASE)
PIECE = 1 << 16  # packed bytes that are unpacked at once
BOM = b"\xef\xbb\xbf"
HEAD = 512  # bytes that tell what a file is
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


class _Zst(io.RawIOBase):
    """Unpacks zstd, and says where a file was cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as exc:
            shown = str(getattr(file, "name", "?"))
            raise DataError(
                f"data file {shown!r} is packed by zstd. Try: {EXTRA}, or unzstd FILE"
            ) from exc
        self._file, self._left, self._frame = file, b"", None
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 at the end."""
        frame = self._frame
        while not self._left:
            packed = (frame.unused_data if frame and frame.eof else b"") or self._file.read(PIECE)
            if not packed:
                if frame is not None and not frame.eof:
                    raise EOFError("it ends in the middle")
                return 0
            if frame is None or frame.eof:
                frame = self._frame = self._new()
            try:
                self._left = frame.decompress(packed)
            except self._error as exc:
                raise OSError(str(exc)) from exc
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


PACKED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": _Zst,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
PANDAS = (
    "python -c \"import pandas; pandas.read_{read}('FILE').to_json('FILE.jsonl', orient='records', "
    'lines=True)"'
)
AGAIN = "get the file again; or, if it holds rows of JSON: mv FILE FILE.jsonl"
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
# first bytes -> what it is, and how rows come of it
OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "git lfs pull"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unzip FILE, or save it as CSV or JSON"),
    b"SQLite format 3": (
        "an SQLite data base",
        "sqlite3 -json FILE 'SELECT ...' | jq -c '.[]' > FILE.jsonl",
    ),
    **dict.fromkeys(
        (b"\xff\xfe\0\0", b"{\0\0\0", b"[\0\0\0"),
        ("text in UTF-32", "iconv -f UTF-32LE -t UTF-8 FILE > FILE.jsonl"),
    ),
    **dict.fromkeys(
        (b"{\0", b"[\0"), ("text in UTF-16", "iconv -f UTF-16LE -t UTF-8 FILE > FILE.jsonl")
    ),
    b"\xff\xfe": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    b"\xfe\xff": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
    b"\x80\x04": ("a Python pickle, which may run code", "write its rows as JSON lines"),
    b"\x80\x05": ("a Python pickle, which may run code", "write its rows as JSON lines"),
    b"%PDF": ("a PDF", "a file of conversations"),
    b"Obj\x01": ("a file of Avro", "fastavro FILE > FILE.jsonl (pip install fastavro)"),
    b"ORC": ("a table of ORC", PANDAS.format(read="orc")),
    b"FEA1": ("a table of Feather, version 1", PANDAS.format(read="feather")),
    b"\x89HDF": ("a file of HDF5", "write its rows as JSON lines"),
    b"\x93NUMPY": ("an array of numpy", "write its rows as JSON lines"),
    b"7z\xbc\xaf": ("an archive", "7z x FILE, and name what is in it"),
    b"Rar!": ("an archive", "unrar x FILE, and name what is in it"),
    b"\x04\x22\x4d\x18": ("packed by lz4", "lz4 -d FILE"),
    **dict.fromkeys(
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"),
        ("a web page or XML, perhaps in the place of a download", "get the file again"),
    ),
}
CSV = PANDAS.format(read="csv")
BY_ENDING = {
    ".csv": ("a table of text", CSV),
    ".tsv": ("a table of text", CSV.replace("'FILE')", "'FILE', sep='\\t')")),
    ".txt": ("plain text", "a file of conversations, one JSON object a line"),
    ".md": ("plain text", "a file of conversations, one JSON object a line"),
    ".yaml": ("YAML", "yq -o json -I 0 '.[]' FILE > FILE.jsonl"),
    ".yml": ("YAML", "yq -o json -I 0 '.[]' FILE > FILE.jsonl"),
    ".safetensors": ("tensors", "data.capture_dir=FOLDER, if it is of a capture"),
    ".pt": ("tensors of torch", "write its rows as JSON lines"),
}


def read_file(path: Path, name: str) -> Iterator[Line | DataError]:
    """Yield a file's rows, called `name`:1 and so on.  Raises DataError for what is none."""
    with open_data(path) as file:
        yield from _rows(file, path, name)


@contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """Open a file; what is wrong with it while it is read is a DataError with its name."""
    try:
        with path.open("rb") as file:
            yield file
    except DAMAGED as exc:
        system = exc.strerror if isinstance(exc, OSError) else None
        reason = system or f"{exc}. It is damaged: get it again"
        raise DataError(f"data file {str(path)!r} cannot be read: {reason}") from exc


def is_lines(path: Path) -> bool:
    """Say whether `read_file` reads a file as lines that are not packed."""
    with open_data(path) as file:
        return _peek(file).removeprefix(BOM).lstrip()[:1] == b"{" and not _is_named_table(path)


def _is_named_table(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".arrow")


def _rows(file: IO[bytes], path: Path, name: str) -> Iterator[Line | DataError]:
    head = _peek(file)
    if (opener := _of(head, PACKED)) is not None:
        with opener(file) as unpacked, io.BufferedReader(unpacked) as stream:
            head = stream.peek(HEAD)[:HEAD]
            if _of(head, PACKED) is not None:
                raise _no_rows(path, "packed twice", "unpack it once")
            if head[257:262] == b"ustar" or _of(head, dict.fromkeys(TABLES, True)):
                what = "an archive" if head[257:262] == b"ustar" else "a table"
                raise _no_rows(path, f"{what}, packed", "unpack it, and name what is in it")
            yield from _text(stream, head, path, name)
    elif any(head.startswith(first) for first in TABLES):
        yield from _table(path, name, head)
    else:
        yield from _text(file, head, path, name)


def _peek(file: IO[bytes]) -> bytes:
    head = file.read(HEAD)
    file.seek(0)
    return head


def _of(head: bytes, table: dict[bytes, Any]) -> Any:
    return next((value for first, value in table.items() if head.startswith(first)), None)


def _text(stream: IO[bytes], head: bytes, path: Path, name: str) -> Iterator[Line | DataError]:
    start = head.removeprefix(BOM).lstrip()
    known = _of(start, OTHERS) or _of(head, OTHERS)
    if known is None and start[:1] not in (b"{", b"["):
        known = BY_ENDING.get(Path(PACKED_NAME.sub("", path.name)).suffix.lower())
        if head[257:262] == b"ustar":
            known = ("an archive", "tar xf FILE, and name what is in it")
        if known is None and b"\0" in head:
            known = ("of no kind that is known", "a file of conversations, one JSON object a line")
    if known is None and _is_named_table(path):
        held = "text" if start else "empty"  # what a server said in the place of the file
        known = f"{held}, and named as a table", AGAIN
    if known is not None:
        raise _no_rows(path, *known)
    lines = path.name.partition(".")[2].startswith(("jsonl", "ndjson"))
    objects = start[1:].lstrip()[:1] in (b"{", b"")  # `[[` in a file of lines is one bad line
    if start[:1] == b"[" and (objects or not lines):
        yield from read_array(stream, name)
    else:
        yield from read_lines(stream, name)


def _no_rows(path: Path, what: str, how: str) -> DataError:
    shown = how.replace("FILE", str(path))
    return DataError(f"data file {str(path)!r} is {what}, and no file of rows. Try: {shown}")


def _table(path: Path, name: str, head: bytes) -> Iterator[Line | DataError]:
    kind = "Parquet" if head.startswith(b"PAR1") else "Arrow"
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as exc:
        raise DataError(f"data file {str(path)!r} is a table of {kind}. Try: {EXTRA}") from exc
    number = count(1)
    try:
        if kind == "Parquet":
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=HEAD):
                    yield from (Line(row, f"{name}:{next(number)}") for row in batch.to_pylist())
            return
        with pyarrow.memory_map(str(path)) as mapped:
            opened = (
                ipc.open_file(mapped) if head.startswith(b"ARROW1") else ipc.open_stream(mapped)
            )
            batches = opened
            if isinstance(opened, ipc.RecordBatchFileReader):
                batches = map(opened.get_batch, range(opened.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, HEAD):
                    rows = batch.slice(start, HEAD).to_pylist()
                    yield from (Line(row, f"{name}:{next(number)}") for row in rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise DataError(
            f"data file {str(path)!r} is a damaged table of {kind}: {reason}. Get it again"
        ) from exc
