"""Check all that lies in a directory: a capture, a run, a checkpoint, an export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..capture.manifest import MANIFEST
from ..capture.verify import verify_directory
from ..capture.writer import SHARDS, VALIDATION
from ..config import RunConfig
from ..documents import open_regular
from ..errors import CheckpointError, ConfigError
from ..strategy import Strategy
from ..text import counted
from .checkpoint import STATE, check_files, checkpoints, instead_of
from .export import CONFIG, PROVENANCE, WRITTEN, check_export, read_json, read_provenance
from .links import follow
from .tensors import DAMAGE, check_written


def verify(
    directory: Path, run: RunConfig | None, strategy: Strategy | None, recapture: int
) -> Iterator[str]:
    """Say what was found right, a line for each thing in `directory`.

    A run may have been trained where its capture lies, and a capture may have another of what is
    held out.  With a run, `recapture` samples are captured again.  Raises a SpecForgeError for
    the first thing that is damaged, and where there is nothing of these.
    """
    told, stored = verify_draft(directory), os.path.lexists(directory / MANIFEST)
    if told is None and not stored:
        _check_kind(directory)
    if told is not None:
        if run is not None and not stored:
            raise ConfigError(f"-c goes with a capture, and {directory} is none. Take it out")
        yield told
        if not stored:
            return
    yield str(verify_directory(directory, run, strategy, recapture))
    if (directory / VALIDATION).is_dir():
        yield str(verify_directory(directory / VALIDATION, None, None, 0))


def _check_kind(directory: Path) -> None:
    """Raise CheckpointError that says what a directory without anything to check is instead."""
    if not directory.is_dir():
        why = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {why}. Try: specforge verify DIRECTORY")
    if advice := instead_of(directory):
        raise CheckpointError(f"{directory} is no run. {advice}")
    if any(directory.glob(SHARDS)):  # a capture's, whose manifest is gone
        return
    if (directory / CONFIG).exists():
        raise CheckpointError(
            f"{directory} has no {PROVENANCE}: there are no checksums to compare. If it was "
            "exported here, export it again"
        )
    raise CheckpointError(
        f"{directory} is no capture, run, checkpoint or export: none of {MANIFEST}, checkpoints/, "
        f"{STATE} and {PROVENANCE} is there. Try: specforge verify DIRECTORY"
    )


def verify_draft(directory: Path) -> str | None:
    """Say what was found right; None where there is no run, checkpoint or export.

    Raises CheckpointError for the first file that is damaged, missing or left over.
    """
    directory = follow(directory)
    if (directory / PROVENANCE).is_file():
        provenance = read_provenance(directory)
        checked = int(_check(directory, partial(check_export, provenance=provenance)))
        check_config(directory, read_json(directory, CONFIG), provenance)
        return _told(directory, 1, checked, "export")
    found = [directory] if (directory / STATE).is_file() else checkpoints(directory)
    if not found:
        return None
    checked = sum(_check(path, check_files) for path in found)
    return _told(directory, len(found), checked, "checkpoint")


def check_config(directory: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Raise CheckpointError where an export's config.json is not what its provenance.json notes.

    The doctor does not ask for that: it says what another value does.
    """
    written = provenance.get(WRITTEN, config)
    if not isinstance(written, dict):
        raise CheckpointError(f"{directory / PROVENANCE}: {WRITTEN} is no object. Export again")
    check_written(config, written)


def _check(folder: Path, compare: Callable[[Path], bool]) -> bool:
    """Compare, or where there are no checksums see that its files are some of tensors."""
    if compare(folder):
        return True
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no file of tensors. Restore it from a copy")
    for file in files:
        try:
            os.close(open_regular(file))  # safe_open would wait for a pipe
            with safe_open(str(file), framework="pt"):
                pass
        except DAMAGE as exc:
            raise CheckpointError(f"{file} is damaged: {exc}. Restore it from a copy") from exc
    return False


def _told(directory: Path, count: int, checked: int, what: str) -> str:
    if checked == count:
        return f"{directory}: all files of {counted(count, what)} are as they were written"
    return (
        f"{directory}: no checksums are with {count - checked} of {counted(count, what)}, as a "
        "version or program wrote them that wrote none: changed bytes would not be seen"
    )
