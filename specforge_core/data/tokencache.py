"""Rows of tokens on disk: made once on a machine, read by every rank and every later run."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..checksums import file_checksum
from ..files import make_folder, open_own, publish, sweep, temporary_folder, write_file
from ..locks import hold
from ..progress import console
from .promptset import PromptSet, Spool, Told

Fill = Callable[[Spool], Told]

DTYPES = {"input_ids": torch.int32, "loss_mask": torch.int8, "offsets": torch.int64}
TOLD = "told.json"
GROWING = ".growing"  # ending of the file that names the folder which is being filled
KEPT_SECONDS = 30 * 24 * 3600  # since it was last used
POLL_SECONDS = 0.2
NOTE_SECONDS = 30.0


def in_memory(fill: Fill) -> PromptSet:
    """Return prompts that are in this process alone."""
    ids, mask = io.BytesIO(), io.BytesIO()
    spool = Spool(ids, mask)
    told = fill(spool)
    return PromptSet(
        torch.frombuffer(ids.getbuffer(), dtype=torch.int32),
        torch.frombuffer(mask.getbuffer(), dtype=torch.int8),
        torch.frombuffer(spool.offsets, dtype=torch.int64),
        told,
    )


def on_disk(
    folder: Path, key: str, fill: Fill, check: Callable[[], None] | None = None
) -> PromptSet:
    """Return the prompts of `key`, which one process makes while others wait for it.

    In memory, with a line that says why, where the disk takes nothing.  `check` is called while
    another process is waited for: it may raise.
    """
    path = folder / key
    try:
        make_folder(folder)
        with open_own(folder / f"{key}.lock") as lock:
            _wait(lock.fileno(), folder, check)
            found = _read(path)
            if found is None:
                _make_room(folder)
                with temporary_folder(path) as beside, _growing(path, beside):
                    _write(beside, fill)
                    publish(beside, path)
                found = _read(path)
            os.utime(path)
    except OSError as exc:
        why = f"{exc.filename or folder}: {exc.strerror}"
        console.print(f"tokens are not kept in data.cache ({why})")
        found = None
    return in_memory(fill) if found is None else found


def key_of(values: Iterable[object]) -> str:
    """Return a name for what is made of these values by this code."""
    digest = xxhash.xxh3_128(json.dumps(list(values), default=str, sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


@contextmanager
def _growing(path: Path, beside: Path) -> Iterator[None]:
    """Let other processes find the rows of `path` that are in `beside` already."""
    pointer = path.with_name(f"{path.name}{GROWING}")
    write_file(pointer, beside.name.encode())
    try:
        yield
    finally:
        pointer.unlink(missing_ok=True)


def kept(folder: Path, key: str) -> PromptSet | None:
    """Return the prompts of `key` if they were made before."""
    found = _read(folder / key)
    if found is not None:
        with suppress(OSError):
            os.utime(folder / key)
    return found


def _wait(lock: int, folder: Path, check: Callable[[], None] | None) -> None:
    noted = time.monotonic()
    while not hold(lock):
        if check is not None:
            check()
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            console.print(f"waiting for another process's tokens in {folder}")
        time.sleep(POLL_SECONDS)


def _write(beside: Path, fill: Fill) -> None:
    with (
        (beside / "input_ids").open("wb") as ids,
        (beside / "loss_mask").open("wb") as mask,
        (beside / "offsets").open("wb") as offsets,
    ):
        spool = Spool(ids, mask, offsets)
        told = fill(spool)
        spool.show()
        for file in (ids, mask, offsets):
            os.fsync(file.fileno())
    files = {
        name: [(beside / name).stat().st_size, file_checksum(beside / name)] for name in DTYPES
    }
    write_file(beside / TOLD, json.dumps({"told": asdict(told), "files": files}).encode())


def _read(path: Path) -> PromptSet | None:
    """Return what is there; None where it is not, or not as it was written."""
    try:
        found: Mapping[str, Any] = json.loads((path / TOLD).read_bytes())
        tensors = {}
        for name, dtype in DTYPES.items():
            size, checksum = found["files"][name]
            if file_checksum(path / name) != checksum:
                return None
            count = size // dtype.itemsize
            tensors[name] = torch.from_file(str(path / name), shared=False, size=count, dtype=dtype)
        return PromptSet(**tensors, told=Told(**found["told"]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None


def _make_room(folder: Path) -> None:
    """Remove what killed processes left, and what nobody has used for long."""
    sweep(folder)
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
