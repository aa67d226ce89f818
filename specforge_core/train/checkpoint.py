"""Write checkpoints and resume from them.

A checkpoint is written into a hidden directory beside its place and renamed when
whole, so `step-000100` either is complete or is not there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..drafts.checkpoint import (
    STATE,
    TrainState,
    checkpoints,
    first_failure,
    load_tensors,
    read_state,
    under,
    write_checksums,
)
from ..drafts.links import BEST, LATEST, link
from ..errors import RunError
from ..files import (
    cannot_write,
    publish,
    remedied,
    remove_folder,
    system_error,
    temporary_folder,
    write_file,
)
from ..types import Draft
from .metrics import RESTART

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # file systems without symbolic links
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which checkpoints stay."""

    newest: int
    best: int | None = None  # the step of the one that `best` leads to
    others: frozenset[int] = frozenset()  # steps of those that something still reads


def save(
    output_dir: Path, draft: Draft, optimizers: list[Optimizer], state: TrainState, kept: Kept
) -> Path:
    """Write one checkpoint from all ranks; rank 0 renames it into place and drops old ones.

    Raises RunError on every rank when what would be saved is not finite, or any rank could not
    write (a full disk); the checkpoints that were there before stay.
    """
    tensors = {k: v for k, v in _collect(draft, optimizers).items() if isinstance(v, Tensor)}
    check_finite(tensors, state.step)
    final = place_of(output_dir, state.step)
    with ExitStack() as stack, _refusing(final):
        beside = _on_main_rank(lambda: str(stack.enter_context(temporary_folder(final))))
        storage = HuggingFaceStorageWriter(beside, save_distributed=True)
        dcp_save(tensors, storage_writer=storage)

        def finish() -> str:
            path = Path(beside)
            data = state.model_dump_json(indent=1).encode() + b"\n"
            write_checksums(path, data)
            write_file(path / STATE, data)
            publish(path, final)
            tidy(output_dir, kept)
            return beside

        _on_main_rank(finish)
    return final


def tidy(output_dir: Path, kept: Kept) -> None:
    """Let `latest` and `best` lead to their checkpoints, and drop those that do not stay.

    Raises OSError.
    """
    if not (found := checkpoints(output_dir)):
        return
    for name, path in ((LATEST, found[-1]), (BEST, place_of(output_dir, kept.best))):
        if path in found:
            _link(output_dir, name, path)
    stay = {place_of(output_dir, step) for step in (kept.best, *kept.others)}
    if (best := output_dir / BEST).is_symlink():  # also without train.keep_best
        stay.add(output_dir / "checkpoints" / best.readlink().name)
    for old in found[: -kept.newest]:
        if old not in stay:
            remove_folder(old)


def place_of(output_dir: Path, step: int | None) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return output_dir / "checkpoints" / f"step-{step or 0:08d}"


def _link(output_dir: Path, name: str, path: Path) -> None:
    try:
        link(output_dir, name, path)
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise


def _on_main_rank(work: Callable[[], str]) -> str:
    """Let rank 0 work; every rank returns what it returned, or raises its OSError."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [work()]
        except OSError as exc:
            told = [OSError(exc.errno, exc.strerror, exc.filename)]
    dist.broadcast_object_list(told)
    if isinstance(told[0], OSError):
        raise told[0]
    return str(told[0])


@contextmanager
def _refusing(final: Path) -> Iterator[None]:
    """Say what could not be written, of whichever rank."""
    try:
        yield
    except (OSError, CheckpointException) as exc:
        cause = first_failure(exc)
        if not isinstance(cause, OSError | SafetensorError):
            raise
        failure = system_error(cause, final)
        raise RunError(f"checkpoint {cannot_write(failure)}. {remedied(RESTART, failure)}") from exc


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise RunError, on every rank, when a number that any rank holds is not finite."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    device = max((part.device for part in parts), key=str)  # a GPU, if one holds any
    bad = torch.stack([~part.isfinite().all().to(device) for part in parts]).int()
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    found = [name for name, is_bad in zip(tensors, bad.tolist(), strict=True) if is_bad]
    if found:
        raise RunError(
            f"{found[0]} is not finite after step {step} ({len(found)} of {len(parts)} tensors "
            "are not), so nothing was saved. Start again from the last checkpoint with a lower "
            "train.learning_rate"
        )


def load(path: Path, draft: Draft, optimizers: list[Optimizer]) -> TrainState:
    """Restore a sharded model and its optimizers in place; the world size may differ."""
    state = read_state(path)
    tensors = _collect(draft, optimizers)
    wanted = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
    load_tensors(path, wanted, prefixes=("model.", "optim"))
    tensors |= wanted
    model = draft.model
    everything: dict[str, Any] = get_model_state_dict(model)
    set_model_state_dict(model, everything | under(tensors, "model."))
    for number, optimizer in enumerate(optimizers):
        values = under(tensors, f"optim{number}.")
        set_optimizer_state_dict(model, optimizer, values, options=_FLAT)
    return state


def _collect(draft: Draft, optimizers: list[Optimizer]) -> dict[str, Any]:
    model = draft.model
    values = get_model_state_dict(model)
    found: dict[str, Any] = {f"model.{k}": v for k, v in values.items() if draft.saved(k)}
    for number, optimizer in enumerate(optimizers):
        state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        found |= {f"optim{number}.{k}": v for k, v in state.items()}
    return found
