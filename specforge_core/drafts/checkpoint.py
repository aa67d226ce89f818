"""Read checkpoints: tensors in DCP's safetensors storage, all else in state.json, no pickle."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ..checksums import check_folder, checksum, folder_checksums
from ..errors import CheckpointError
from ..files import write_file
from ..types import Draft
from .export import PROVENANCE
from .links import CHECKPOINTS, follow
from .state import (
    CHECKSUMS as CHECKSUMS,
    STATE as STATE,
    TrainState as TrainState,
    checkpoints as checkpoints,
    instead,
    read_checksums,
    read_state as read_state,
    step_of,
)
from .tensors import DAMAGE, check_finite, check_stored


def write_checksums(path: Path, state: bytes) -> None:
    """Write down the checksums of a checkpoint's tensor files and its state.  Raises OSError."""
    checksums = {**folder_checksums(path), STATE: checksum(state)}
    write_file(path / CHECKSUMS, json.dumps(checksums, indent=1).encode() + b"\n")


def check_files(path: Path) -> bool:
    """Read a checkpoint's tensor files and state whole and compare their checksums.

    Returns False where it has none: a version wrote it that had none.  Raises CheckpointError.
    """
    if (checksums := read_checksums(path)) is None:
        return False
    check_folder(path, checksums, instead(path), others=(STATE,))
    return True


def find(path: Path) -> Path:
    """Return a checkpoint directory: `path` itself, or the newest one of a run at `path`.

    RUN@best is the one that `train.keep_best` kept.  Raises CheckpointError where there is none.
    """
    path = follow(path)
    if (path / STATE).exists():
        return path
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file. Try the folder of a run, checkpoint or export")
    found = checkpoints(path)
    if not found:
        advice = instead_of(path) or f"Try: specforge train -c RUN.yaml output_dir={path}"
        raise CheckpointError(f"{path} holds no complete checkpoint. {advice}")
    return found[-1]


def instead_of(path: Path) -> str:
    """Return what to name instead of a folder of a run or an export; nothing if it is neither."""
    if path.name == CHECKPOINTS and checkpoints(path.parent):
        return f"Try the run that it is of: {path.parent}"
    if (path / PROVENANCE).exists():
        return "It is an export. Try the run or checkpoint that it was made from"
    return ""


def check_strategy(path: Path, trained: str, name: str) -> None:
    """Raise CheckpointError when a draft was trained with another strategy."""
    if trained != name:
        raise CheckpointError(
            f"{path} was trained with strategy {trained!r}, this run is {name!r}. "
            f"Try: strategy.name={trained}, or another output_dir"
        )


def remove_incomplete(output_dir: Path) -> list[Path]:
    """Remove what killed runs left of checkpoints: temporaries, and folders without state.json.

    Only for the run that has claimed `output_dir`.  Returns the latter.
    """
    removed = []
    for path in output_dir.glob("checkpoints/*"):
        temporary = path.name.startswith(".step-") and path.name.endswith(".tmp")
        incomplete = step_of(path) is not None and not (path / STATE).exists()
        if (temporary or incomplete) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            removed += [path] if incomplete else []
    return sorted(removed)


def load_model(path: Path, draft: Draft) -> TrainState:
    """Restore an unsharded draft's weights, without a process group.

    Raises CheckpointError for a checkpoint that is damaged or holds other tensors.
    """
    state = read_state(path)
    model = draft.model.float()  # as it was trained and saved
    values = model.state_dict()
    wanted: dict[str, Any] = {f"model.{k}": v for k, v in values.items() if draft.saved(k)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_tensors(path, wanted, prefixes=("model.",), no_dist=True)
    model.load_state_dict(values | under(wanted, "model."))
    return state


def load_tensors(
    path: Path, wanted: dict[str, Tensor], *, prefixes: tuple[str, ...], no_dist: bool = False
) -> None:
    """Fill `wanted` in place with a checkpoint's tensors of the same names.

    Raises CheckpointError when a file is not as it was written, when names (below `prefixes`,
    both ways), shapes or dtypes differ, and when a value is not finite.
    """
    check_files(path)
    check_stored(path, wanted, prefixes)
    with _damage(path):
        dcp_load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
    check_finite(str(path), wanted)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what DCP raises of a damaged checkpoint, which is no Exception, into an error."""
    try:
        yield
    except CheckpointException as exc:
        cause = first_failure(exc)
        if not isinstance(cause, DAMAGE):
            raise
        reason = cause
    except DAMAGE as exc:
        reason = exc
    else:
        return
    raise CheckpointError(
        f"{path} is damaged: {type(reason).__name__}: {reason!s:.200}. {instead(path)}"
    ) from reason


def first_failure(exc: BaseException) -> BaseException:
    """Return the first real error inside DCP's exception, which wraps one of each rank."""
    if not isinstance(exc, CheckpointException):
        return exc
    first, _ = next(iter(exc.failures.values()))
    return first


def under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
