"""`OUTPUT_DIR/best` and `latest`: links to checkpoints, and `OUTPUT_DIR@best`, which names one."""

from __future__ import annotations

import os
from pathlib import Path

from ..claim import BEST as BEST, CHECKPOINTS as CHECKPOINTS, LATEST as LATEST
from ..errors import CheckpointError
from ..files import sync_folder, temporary
from .state import STATE, step_of

MARK = "@"


def link(output_dir: Path, name: str, checkpoint: Path) -> None:
    """Let `output_dir`/`name` lead to one of its checkpoints, from one moment to the next.

    What has that name and is no such link stays: somebody's own, or a folder in a copy of a run.
    Raises OSError.
    """
    place = output_dir / name
    if os.path.lexists(place) and not _is_own(place):
        return
    beside = temporary(place)
    beside.symlink_to(checkpoint.relative_to(output_dir))
    try:
        beside.replace(place)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(output_dir)


def odd_links(output_dir: Path) -> list[str]:
    """Return a line for each name of these that leads to no checkpoint, and why."""
    lines = []
    for name in (LATEST, BEST):
        place, named = output_dir / name, f"{output_dir}{MARK}{name}"
        if os.path.lexists(place) and not _is_own(place):
            lines.append(
                f"{place} is no link to a checkpoint of this run. It stays as it is, and {named} "
                "names none"
            )
        elif name == BEST and place.is_symlink() and not place.exists():
            lines.append(
                f"{place} leads to {place.readlink()}, which is not there: {named} names none "
                "until another one is the best"
            )
    return lines


def _is_own(place: Path) -> bool:
    """Say whether this is a link as `link` makes them, also where its checkpoint is gone."""
    if not place.is_symlink():
        return False
    found = place.parent / place.readlink()
    own = place.parent / CHECKPOINTS
    return step_of(found) is not None and found.parent.resolve() == own.resolve()


def follow(path: Path) -> Path:
    """Return the checkpoint that OUTPUT_DIR@best or OUTPUT_DIR@latest names; else `path` itself.

    Raises CheckpointError where that link leads nowhere, or to no checkpoint of this run.
    """
    run, mark, name = path.name.rpartition(MARK)
    if not mark or name not in (BEST, LATEST) or path.exists():
        return path
    place = path.with_name(run) / name if run else path.parent / name
    if place.exists() and place.is_symlink():
        found = place.parent / place.readlink()
        if found.resolve().parent != (place.parent / CHECKPOINTS).resolve():
            raise CheckpointError(
                f"{path}: the link leads to {found}, no checkpoint of this run. If that is meant, "
                "name it"
            )
        return found
    why, advice = "no link to a checkpoint is there", f"Try: {place.parent}"
    if (place / STATE).is_file():
        why, advice = "it is a folder, as in a copy, and no link", f"Try: {place}"
    elif place.is_symlink():
        why = f"the link leads to {place.readlink()}, which is not there"
    elif place.exists():
        why = "it is no link to a checkpoint, but somebody's own"
    elif name == BEST:
        advice = "Train with train.keep_best=validation_loss (or acceptance)"
    raise CheckpointError(f"{path} names {place}, and {why}. {advice}")


def run_of(directory: Path) -> Path | None:
    """Return the run whose checkpoints, or links to them, a folder would be among."""
    if directory.name in (BEST, LATEST) and (directory.parent / CHECKPOINTS).is_dir():
        return directory.parent
    inside = (path for path in (directory, *directory.parents) if step_of(path) is not None)
    return next((path.parent.parent for path in inside if path.parent.name == CHECKPOINTS), None)
