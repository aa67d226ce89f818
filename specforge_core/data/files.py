"""What an entry of `data.train` names: a file, a folder, a pattern, a data set of Hugging Face."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ..checksums import file_checksum
from ..config import DataConfig
from ..documents import open_regular
from ..errors import DataError
from ..section import expand
from .folders import files_in, held_out, tell_once
from .formats import ENDINGS, EXTRA, read_file
from .sources import Line, Rows

HUB = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+){0,2}")  # NAME, NAME:SPLIT, NAME:CONFIG:SPLIT
GLANCE, LEAST = 1 << 20, 1 << 12  # bytes that `glance` reads at either end, of all files; of one
ADDRESS = re.compile(r"\w+://.+")


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of some files, one file behind the other."""

    files: tuple[Path, ...]
    folder: Path  # that their names are told from
    held_out: tuple[Path, ...] = ()  # those that are so by their names, which nobody said

    def __iter__(self) -> Iterator[Line | DataError]:
        for path in self.files:
            yield from read_file(path, str(path.relative_to(self.folder)))

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files if path.exists())

    def fingerprint(self) -> str:
        """Return what changes with the rows: a hash of all that is in the files."""
        digest = xxhash.xxh3_128()
        for path in self.files:
            try:
                digest.update(file_checksum(path).encode())
            except OSError as exc:
                raise DataError(f"data file {str(path)!r} cannot be read: {exc.strerror}") from exc
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class HubRows:
    """The rows of a data set that the `datasets` library loaded."""

    found: Any
    name: str

    def __iter__(self) -> Iterator[Line | DataError]:
        for number, row in enumerate(self.found, 1):
            yield Line(row, f"{self.name}:{number}")

    @property
    def num_bytes(self) -> int:
        return int(self.found.data.nbytes)

    def fingerprint(self) -> str:
        """Return the library's own."""
        return str(self.found._fingerprint)


def open_source(source: str) -> FileRows | HubRows:
    """Find what a source names; its rows are read when they are asked for.

    Raises DataError where there is nothing of the kind.
    """
    path = Path(expand(source))
    if path.is_file():
        return FileRows((path,), path.parent)
    if path.is_dir():
        files = tuple(files_in(path))
        return FileRows(files, path, held_out(files, path))
    if path.exists():
        raise DataError(
            f"data file {source!r} is no regular file: rows are read more than once. "
            "Write them to a file first"
        )
    if ADDRESS.fullmatch(source):
        raise DataError(
            f"{source!r} is an address, and rows are read from files. Download it, and name the "
            "file: data.train=[PATH]; of Hugging Face name the data set: data.train=[OWNER/NAME]"
        )
    if glob.has_magic(source):
        base = Path(path.anchor or ".")
        inner = str(path.relative_to(path.anchor))
        try:
            files = tuple(sorted(found for found in base.glob(inner) if found.is_file()))
        except ValueError as exc:
            raise DataError(f"data.train: {source!r} is no pattern of names: {exc}") from exc
        if files:
            return FileRows(files, _common(files), held_out(files, path))
        raise DataError(
            f"no file has a name like {source!r}. Paths are taken from the working "
            f"directory, {Path.cwd()}; correct it in the config, or with KEY=[PATH]"
        )
    if HUB.fullmatch(source) and not path.parent.exists() and not source.endswith(ENDINGS):
        return _hub(source)
    folder, _, split = source.partition(":")
    if split and (there := Path(expand(folder))).is_dir():
        inside = min(there.glob(f"{glob.escape(split)}*"), default=there / "FILE")
        raise DataError(
            f"data file {source!r} does not exist: NAME:SPLIT is of Hugging Face, and {folder!r} "
            f"is a folder here. Name what is in it, as data.train=[{inside}]"
        )
    raise DataError(
        f"data file {source!r} does not exist. Paths are taken from the working "
        f"directory, {Path.cwd()}; correct it in the config, or with KEY=[PATH]"
    )


def glance(data: DataConfig) -> str | None:
    """Return what tells the conversations of `data.train` from others, at little cost.

    Of each file its size, its beginning and its end, however large it is: of one a megabyte, of
    many less each.  None where one of the sources may be no file of this machine.  Raises
    DataError for one that is not there.
    """
    digest = xxhash.xxh3_128()
    parts = data.validation if isinstance(data.validation, float) else None
    digest.update(repr((data.limit, data.mix, parts)).encode())
    for source in data.train:
        there = Path(expand(source)).exists() or source.endswith(ENDINGS)
        if not there and (":" in source or HUB.fullmatch(source)):
            return None
        rows = open_source(source)
        kept = set(rows.files) - set(rows.held_out) if isinstance(rows, FileRows) else ()
        piece = max(LEAST, GLANCE // max(1, len(kept)))
        for path in sorted(kept):
            try:
                with os.fdopen(open_regular(path), "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(f"{size} ".encode() + file.read(piece))
                    file.seek(max(0, size - piece))
                    digest.update(file.read(piece))
            except OSError as exc:
                raise DataError(f"data file {str(path)!r} cannot be read: {exc.strerror}") from exc
    return digest.hexdigest()


def to_train_on(rows: Rows, option: str) -> Rows:
    """Return `rows` without files that are held out by their names, unless a source names them.

    `option` has the sources; files that it has twice are told of.  DataError where a source has
    no other files.
    """
    seen: dict[object, str] = {}  # a file, under whatever name, or a data set -> its first source

    def opened(source: str, data: DataConfig) -> Iterable[Mapping[str, Any] | DataError]:
        found = chosen(source, data)
        names = _told_apart(source, found)
        twice = {seen[key]: name for key, name in reversed(names.items()) if key in seen}
        for first, name in twice.items():
            tell_once(
                f"note: {option} has {name} twice, in {first!r} and in {source!r}: its "
                "conversations count twice"
            )
        seen.update({key: source for key in names if key not in seen})
        return found

    def chosen(source: str, data: DataConfig) -> Iterable[Mapping[str, Any] | DataError]:
        found = rows(source, data)
        if not isinstance(found, FileRows) or not found.held_out:
            return found
        names = _named(found.held_out)
        rest = tuple(path for path in found.files if path not in found.held_out)
        if not rest:
            raise DataError(
                f"all files of {source!r} are named as held out, and such are trained on only "
                f"where they are named. If they are meant: {option}=[{names}]"
            )
        tell_once(
            f"note: of {source!r} {names} is left out, as the name says. To train on it, too, "
            f"name it in {option}"
        )
        return replace(found, files=rest, held_out=())

    return opened


def _named(files: Sequence[Path]) -> str:
    """Return what names files that are held out: of many a pattern that has the split in it."""
    # of their characters: test-00000, test-00001 are test-0000*
    pattern = f"{os.path.commonprefix([str(path) for path in files])}*"  # noqa: RUF071
    if len(files) <= 5 or held_out(files[:1], Path(pattern)):
        return ", ".join(map(str, files))
    return f"'{pattern}'"


def _told_apart(source: str, found: object) -> dict[object, str]:
    """Return what tells each file of a source from all others, with its name."""
    if not isinstance(found, FileRows):
        return {found.fingerprint() if isinstance(found, HubRows) else source: source}
    status = {path: path.stat() for path in found.files if path.exists()}
    return {(one.st_dev, one.st_ino): str(path) for path, one in status.items()}


def _common(files: Iterable[Path]) -> Path:
    """Return the innermost folder that holds all of them."""
    folders = [set(path.parents) for path in files]
    return max(set.intersection(*folders), key=lambda folder: len(folder.parts))


def _hub(source: str) -> HubRows:
    name, *more = source.split(":")
    try:
        import datasets
    except ImportError as exc:
        raise DataError(
            f"{source!r} is no file here. If it is a data set of Hugging Face: {EXTRA}"
        ) from exc
    config, split = (more[0] if len(more) == 2 else None), (more[-1] if more else "train")
    try:
        found: Mapping[str, Any] = datasets.load_dataset(name, config, split=split)
    except MemoryError:
        raise
    except Exception as exc:  # whatever the network, the hub or the data set's files make of it
        reason = " ".join(str(exc).split())[:300]
        raise DataError(
            f"{source!r} is no file here, and cannot be loaded as a data set of Hugging Face: "
            f"{type(exc).__name__}: {reason}. Try: data.train=[NAME:SPLIT], or "
            "[NAME:CONFIG:SPLIT], or a file"
        ) from exc
    return HubRows(found, source)
