"""`OUTPUT_DIR/best` and `latest`: links to checkpoints, and `OUTPUT_DIR@best`, which names one."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..files import sync_folder, temporary
from .state import step_of

BEST, LATEST = "best", "latest"
MARK = "@"
CHECKPOINTS = "checkpoints"


def link(output_dir: Path, name: str, checkpoint: Path) -> None:
    """Let `output_dir`/`name` lead to one of its checkpoints, from one moment to the next.

    What has that name and is no link stays: a copy of a run may have folders there.  Raises
    OSError.
    """
    place = output_dir / name
    if place.exists() and not place.is_symlink():
        return
    beside = temporary(place)
    beside.symlink_to(checkpoint.relative_to(output_dir))
    try:
        beside.replace(place)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(output_dir)


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
                f"{path}: the link leads out of the run, to {found}. If that is meant, name it"
            )
        return found
    advice = f"Try: {place.parent}"
    if name == BEST:
        advice = "Train with train.keep_best=validation_loss (or acceptance)"
    if place.exists():
        advice = f"Is it a copy? Name a checkpoint: {place.parent}/checkpoints/step-..."
    raise CheckpointError(f"{path}: no link to a checkpoint is at {place}. {advice}")


def run_of(directory: Path) -> Path | None:
    """Return the run whose checkpoints, or links to them, a folder would be among."""
    if directory.name in (BEST, LATEST) and (directory.parent / CHECKPOINTS).is_dir():
        return directory.parent
    inside = (path for path in (directory, *directory.parents) if step_of(path) is not None)
    return next((path.parent.parent for path in inside if path.parent.name == CHECKPOINTS), None)
