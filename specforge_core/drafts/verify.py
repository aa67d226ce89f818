"""Compare the files of a run, checkpoint or export with the checksums of their writer."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import STATE, check_files, checkpoints
from .export import PROVENANCE, check_export


def verify_draft(directory: Path) -> str | None:
    """Say what was found right; None where there is no run, checkpoint or export.

    Raises CheckpointError for the first file that is damaged, missing or left over.
    """
    if (directory / PROVENANCE).is_file():
        return _told(directory, 1, int(check_export(directory)), "export")
    found = [directory] if (directory / STATE).is_file() else checkpoints(directory)
    if not found:
        return None
    checked = sum(check_files(path) for path in found)
    return _told(directory, len(found), checked, "checkpoint")


def _told(directory: Path, count: int, checked: int, what: str) -> str:
    plural = "s" if count > 1 else ""
    if checked == count:
        return f"{directory}: the weights of {count} {what}{plural} are as they were written"
    return (
        f"{directory}: {count - checked} of {count} {what}{plural} have no checksums, of a "
        "version or program that wrote none: changed bytes would not be seen"
    )
