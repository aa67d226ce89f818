"""Every single operation on files fails once: the old or the new state is there, and no rest."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.capture.verify import verify_directory
from specforge_core.capture.writer import ShardWriter
from specforge_core.drafts.export import read_export, write_export
from specforge_core.errors import CaptureError, CheckpointError, SpecForgeError
from specforge_core.files import TEMPORARY
from specforge_core.types import Export

from .captured import identity

IDENTITY = identity(fields={"hidden": ((None, 4), "float32")})
OPERATIONS = ("open", "fsync", "replace", "rename", "mkdir")


@contextmanager
def failing(place: int, number: int) -> Iterator[list[str]]:
    """Let the operation `place`, counted from 0, fail; yield the names of all that were asked."""
    asked: list[str] = []
    real = {name: getattr(os, name) for name in OPERATIONS}

    def wrap(name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            reads = name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads:
                asked.append(name)
                if len(asked) == place + 1:
                    raise OSError(number, os.strerror(number))
            return real[name](*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrap(name))
        yield asked


def refusal(kind: type[SpecForgeError], work: Callable[[], object]) -> str:
    """Return what is said when the work fails; nothing when it does not."""
    try:
        work()
    except kind as exc:
        return str(exc)
    return ""


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if TEMPORARY.fullmatch(path.name)]


def capture(directory: Path) -> None:
    """Write what is not there yet of 6 samples."""
    with ShardWriter(directory, IDENTITY, 10, prompts="p", num_prompts=6) as writer:
        if not writer.manifest.complete:
            writer.begin(torch.ones(100, dtype=torch.int64))
            for index in range(6):
                if index not in writer.done:
                    writer.add(index, {"hidden": torch.full((5, 4), float(index))})
            writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_capture_goes_on_from_wherever_it_failed(tmp_path: Path, number: int) -> None:
    place, names = 0, set[str]()
    while True:
        directory = tmp_path / str(place) / "capture"
        with failing(place, number) as asked:
            told = refusal(CaptureError, lambda: capture(directory))  # noqa: B023
        if len(asked) <= place:
            break
        assert f"cannot be written: {os.strerror(number)}" in told
        names.add(asked[-1])
        assert leftovers(tmp_path) == []
        if (directory / "manifest.json").exists():
            reader = ShardReader(directory, CaptureManifest.read(directory))
            for row in range(len(reader)):
                assert reader[row]["hidden"].unique().tolist() == [reader.prompt_index(row)]
        capture(directory)
        report = verify_directory(directory, None, None, 0)
        assert (report.num_samples, report.complete, report.unchecked) == (6, True, "")
        place += 1
    assert names == {"open", "fsync", "replace", "mkdir"}
    assert place > 20


@pytest.mark.parametrize("there", [False, True])
def test_an_export_is_the_old_or_the_new_one(tmp_path: Path, there: bool) -> None:
    def write(value: float, folder: Path) -> None:
        weights = {name: torch.full((3,), value) for name in "ab"}
        write_export(Export(config={}, weights=weights), folder, {}, force=True, shard_bytes=12)

    place = 0
    while True:
        folder = tmp_path / str(place) / "draft"
        if there:
            write(1.0, folder)
        with failing(place, errno.ENOSPC) as asked:
            told = refusal(CheckpointError, lambda: write(2.0, folder))  # noqa: B023
        if len(asked) <= place:
            break
        if not told:  # to make a folder that is there may fail
            assert asked[place] == "mkdir"
            assert read_export(folder).weights["a"][0] == 2.0
            place += 1
            continue
        assert "cannot be written: No space left on device (" in told
        assert leftovers(tmp_path) == []
        if folder.exists():
            weights = read_export(folder).weights
            # once it is in its place, only the sync of the names above can still fail
            expected = [1.0] if there and asked[-1] != "fsync" else [1.0, 2.0]
            assert weights["a"][0] in expected
            assert torch.equal(weights["a"], weights["b"])
        else:
            assert not there
        place += 1
    assert place > 10
