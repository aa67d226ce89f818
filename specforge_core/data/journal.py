"""A JSONL file that only grows: what `append` returned from is still there after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DataError
from ..files import append, cannot_write, make_folder, remedied, sync_folder
from ..locks import hold
from ..text import line_of

OTHER_FORMATS = (".gz", ".zst", ".bz2", ".xz", ".parquet", ".arrow", ".csv")
START = b'{"id": '  # of every line: rows have their id first


class Journal:
    """Appends whole rows, or nothing.  One process at a time may hold a file open.

    A line that a killed process left half-written is cut off by the next append,
    so that a file given by mistake is not touched.  An empty file is removed on exit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.name.endswith(OTHER_FORMATS):
            raise DataError(
                f"output {str(path)!r} has the name of a packed file or a table, and lines of JSON "
                f"are written. Try: -o {path.name.partition('.')[0] or 'FILE'}.jsonl"
            )
        try:
            make_folder(path.parent)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise DataError(
                    f"output {str(path)!r} is a device or a pipe, which cannot be read again. "
                    "Try: -o FILE.jsonl"
                )
            self._file = path.open("a+b", buffering=0)
            sync_folder(path.parent)
        except OSError as exc:
            raise self._error(exc) from exc
        except ValueError as exc:
            raise DataError(
                f"output {str(path)!r:.300} cannot be written: {exc}. Try: -o FILE.jsonl"
            ) from exc
        if not hold(self._file):
            self._file.close()
            raise DataError(
                f"another process is writing {str(path)!r}. Wait for it, or try: -o OTHER.jsonl"
            )
        self._size = self._whole_lines()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every row.  Raises DataError for a line that no journal wrote."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and line[: len(START)] == START[: len(line)]:
                    return  # half-written
                try:
                    row = json.loads(line)
                    row["id"]
                except (ValueError, TypeError, KeyError, RecursionError) as exc:
                    raise DataError(
                        f"{self.path}:{number} is no row of this command: {line_of(line)}. "
                        "Try: -o OTHER.jsonl"
                    ) from exc
                yield row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows and wait until the disk has them; DataError, and no row, when it cannot."""
        data = b"".join(map(_line, rows))
        try:
            append(self._file, data, self._size)
        except OSError as exc:
            raise self._error(exc) from exc
        self._size += len(data)

    def clear(self) -> None:
        """Forget every row."""
        self._file.truncate(0)
        self._size = 0

    def _whole_lines(self) -> int:
        """Return how many bytes end in a line break."""
        end = os.fstat(self._file.fileno()).st_size
        while end:
            start = max(0, end - 65536)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def _error(self, exc: OSError) -> DataError:
        advice = (
            "What was written stays. Make room there, or choose another -o PATH, then run the same "
            "command to go on"
        )
        return DataError(f"output {cannot_write(exc, self.path)}. {remedied(advice, exc)}")


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return (json.dumps(row) + "\n").encode()
