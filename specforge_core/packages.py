"""Metadata of installed packages, read once for as long as nothing is installed or removed.

Reading it takes a tenth of a second with some hundred packages, and a run asks many times.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import suppress
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

Folders = tuple[tuple[str, int], ...]


def version(name: str) -> str:
    """Return the version of an installed package; PackageNotFoundError where there is none."""
    return _version(name, folders())


def versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages by name, to be written down."""
    return {name: version(name) for name in names}


def declared(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, each with its distribution."""
    return list(_entry_points(folders()).select(group=group))


def folders() -> Folders:
    """Return where packages are looked for, and when each place changed last."""
    found = []
    for place in sys.path:
        try:
            found.append((place, os.stat(place or ".").st_mtime_ns))  # noqa: PTH116
        except OSError:
            found.append((place, 0))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _version(name: str, _: Folders) -> str:
    return metadata.version(name)


@functools.lru_cache(maxsize=8)
def _entry_points(_: Folders) -> Any:
    try:
        return metadata.entry_points()  # of every group: one is chosen from it with `select`
    except Exception:  # of one package's file, which may have nothing to do with us
        found: list[EntryPoint] = []
        for dist in metadata.distributions():
            with suppress(Exception):
                found += dist.entry_points
        return metadata.EntryPoints(found)
