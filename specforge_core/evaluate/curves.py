"""What a run has logged so far: the lines of its metrics.jsonl, read while more are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from ..claim import METRICS
from ..documents import open_regular, read_document
from ..errors import CheckpointError
from ..text import line_of

PHASE = "seconds_"
LARGEST = 1 << 36  # bytes of all lines
LAST_STEP = 1 << 53  # beyond it, a float is no step
TOO_LARGE = 1e300  # a number that a sum of some would not be finite of
Point = tuple[int, float]  # step, value


@dataclass(slots=True)
class Curves:
    """A run's numbers by step.  `refresh` reads what was added since."""

    path: Path  # of metrics.jsonl
    name: str  # of the run
    rows: list[dict[str, float]] = field(default_factory=list)  # each has "step"
    _file: tuple[int, int] | None = None  # which file was read: a resumed run writes another
    _read: int = 0  # bytes of whole lines

    @classmethod
    def of(cls, run: Path) -> Curves:
        """Return the curves of an output directory, or of a metrics.jsonl; nothing is read yet."""
        folder = run.parent if run.name == METRICS else run
        return cls(folder / METRICS, Path(os.path.realpath(folder)).name)  # a link to itself, too

    def refresh(self) -> bool:
        """Read the lines added since; True if there are any, or the run began them anew.

        Raises CheckpointError for what is no file of lines of JSON; a file that is not there yet
        has no lines.
        """
        try:
            number = open_regular(self.path)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise self._unreadable(exc.strerror or str(exc)) from exc
        with os.fdopen(number, "rb") as file:
            told = os.fstat(file.fileno())
            mine = (told.st_dev, told.st_ino)
            anew = self._file is not None and (mine != self._file or told.st_size < self._read)
            if self._file is None or anew:
                self._file, self._read, self.rows = mine, 0, []
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that is being written has its turn later
        self._read += len(whole)
        lines = enumerate(whole.splitlines(), len(self.rows) + 1)
        found = [self._row(number, line) for number, line in lines]
        self.rows += found
        return anew or bool(found)

    def series(self, name: str) -> list[Point]:
        """Return one metric's points in the order of steps; what is not finite has none.

        An evaluation that was made up for is logged behind those of later steps.
        """
        found = [
            (int(row["step"]), row[name])
            for row in self.rows
            if name in row and abs(row[name]) < TOO_LARGE
        ]
        return sorted(found, key=itemgetter(0))

    def names(self, chosen: Callable[[str], bool]) -> list[str]:
        """Return the names of the metrics that are chosen, in the order in which they came."""
        return [name for name in dict.fromkeys(n for row in self.rows for n in row) if chosen(name)]

    def _row(self, number: int, line: bytes) -> dict[str, float]:
        try:
            return row_of(line)
        except ValueError as exc:
            raise self._unreadable(f"its line {number} is no metrics: {line_of(line)}") from exc

    def _unreadable(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read: {why}. Name the output_dir of a run that "
            "`specforge train` wrote"
        )


def row_of(line: bytes) -> dict[str, float]:
    """Return the numbers of a line, "step" among them.  Raises ValueError for what is none."""
    try:
        told = json.loads(line)
        if not _is_number(told["step"]) or not abs(told["step"]) < LAST_STEP:
            raise ValueError("its step is no number of one")
        return {name: float(told[name]) for name in told if _is_number(told[name])}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as exc:
        raise ValueError("no line of metrics") from exc


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, float] | None]]:
    """Yield the lines of a metrics.jsonl and their numbers, or None for one that is no metrics.

    A last line that a kill tore is left out; where there is no such file there is none.  Raises
    OSError.
    """
    if not path.exists():
        return
    for line in read_document(path, LARGEST).splitlines(keepends=True):
        try:
            yield line.rstrip(b"\r\n"), row_of(line)
        except ValueError:
            if line.endswith(b"\n"):
                yield line.rstrip(b"\r\n"), None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_loss(name: str) -> bool:
    """Say whether a metric is a loss, of training or held out."""
    return name.rpartition("/")[2] == "loss"


def is_acceptance(name: str) -> bool:
    """Say whether a metric is an acceptance length, simulated or by decoding."""
    return name.startswith("acceptance/") or name.rpartition("/")[2] == "acceptance_length"


def is_rate(name: str) -> bool:
    """Say whether a metric is the throughput."""
    return name == "tokens_per_second"


def is_phase(name: str) -> bool:
    """Say whether a metric is the time of a part of the run."""
    return name.startswith(PHASE)


# what is looked at: a title, and the metrics that belong there
VIEWS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("loss", is_loss),
    ("acceptance length", is_acceptance),
    ("tokens per second", is_rate),
)
