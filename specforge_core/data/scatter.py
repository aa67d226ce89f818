"""Rows of large files of lines in a mixed order, so that the first ones are like all of them.

Training can begin with a group of such rows while the rest is still tokenized.  The order is a
function of the number of lines alone: some lines that follow each other, then some of another
place, of all files of all sources.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from .files import FileRows
from .formats import is_lines, open_data
from .sources import Conversation, Line, conversations, lines_of, mixed, read_lines

GROUP = 1024  # rows that are shuffled together in the first epoch
RUN = 8  # rows that are read at once: a disk that seeks for each row is slow

Opened = Sequence[tuple[str, Iterable[Mapping[str, Any] | DataError]]]


def can_scatter(opened: Opened, data: DataConfig, small: int) -> bool:
    """Say whether rows are read in a mixed order: of lines, more than `small` bytes, and all."""
    files = [rows for _, rows in opened if isinstance(rows, FileRows)]
    return (
        data.shuffle_window is None
        and data.limit is None
        and len(files) == len(opened)
        and sum(rows.num_bytes for rows in files) >= small
        and all(is_lines(path) for rows in files for path in rows.files)
    )


def scattered(opened: Opened, data: DataConfig) -> Iterator[Conversation | DataError]:
    """Yield the conversations of all sources, or what is wrong with a row, in a mixed order.

    With `data.mix` the sources are in its proportion, as `mixed` takes them.
    """
    sources = [rows for _, rows in opened if isinstance(rows, FileRows)]
    files = [(number, path) for number, rows in enumerate(sources) for path in rows.files]
    runs = torch.cat([_runs(place, path) for place, (_, path) in enumerate(files)])
    runs = runs[torch.randperm(len(runs), generator=torch.Generator().manual_seed(0))]
    owner = torch.tensor([number for number, _ in files])[runs[:, 0]]
    apart = [
        _Scattered(rows, [path for _, path in files], runs[owner == number])
        for number, rows in enumerate(sources)
    ]
    names = [source for source, _ in opened]
    found = conversations(list(zip(names, apart, strict=True)), data, need_answer=True)
    if data.mix:
        yield from mixed(found, data.mix)
        return
    for number, size in zip(owner.tolist(), runs[:, 3].tolist(), strict=True):
        yield from islice(found[number], size)


def _runs(file: int, path: Path) -> Tensor:
    """Return `file`, the offset, the line's number and the count of each run of rows, [runs, 4]."""
    found = array("q")
    begin = 0, 1  # behind the row before
    with open_data(path) as lines:
        for count, (_, number) in enumerate(lines_of(lines)):
            if count % RUN == 0:
                found.extend((file, *begin, 0))
            found[-1] += 1
            begin = lines.tell(), number + 1
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class _Scattered:
    """The rows of one source, run by run."""

    rows: FileRows
    files: Sequence[Path]  # of all sources
    runs: Tensor

    def __iter__(self) -> Iterator[Line | DataError]:
        for file, offset, number, size in self.runs.tolist():
            path = self.files[file]
            with open_data(path) as lines:
                lines.seek(offset)
                name = str(path.relative_to(self.rows.folder))
                yield from islice(read_lines(lines, name, number), size)
