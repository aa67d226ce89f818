"""Write checkpoints and resume from them.

A checkpoint is written into a hidden directory beside its place and renamed when
whole, so `step-000100` either is complete or is not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..drafts.checkpoint import STATE, TrainState, check_shapes, checkpoints, read_state, under
from ..errors import RunError
from ..files import write_file
from ..types import Draft

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    output_dir: Path, draft: Draft, optimizers: list[Optimizer], state: TrainState, keep: int
) -> Path:
    """Write one checkpoint from all ranks; rank 0 renames it into place and drops old ones.

    Raises RunError on every rank when what would be saved is not finite, or any rank could not
    write (a full disk); the checkpoints that were there before stay.
    """
    tensors = {k: v for k, v in _collect(draft, optimizers).items() if isinstance(v, Tensor)}
    check_finite(tensors, state.step)
    final = output_dir / "checkpoints" / f"step-{state.step:08d}"
    beside = final.with_name(f".{final.name}.tmp")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    try:
        storage = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        dcp_save(tensors, storage_writer=storage)
        if main:
            write_file(beside / STATE, json.dumps(asdict(state), indent=1).encode() + b"\n")
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            for old in checkpoints(output_dir)[:-keep]:
                shutil.rmtree(old)
    except (OSError, CheckpointException) as exc:
        if main:
            shutil.rmtree(beside, ignore_errors=True)
        cause = _cause(exc)
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise RunError(
            f"checkpoint {final} could not be written: {cause}. The checkpoints before it "
            "are whole; free space and start the same command again"
        ) from exc
    dist.barrier()
    return final


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
    check_shapes(path, wanted)
    dcp_load(wanted, storage_reader=HuggingFaceStorageReader(str(path)))
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


def _cause(exc: BaseException) -> BaseException:
    """Return the first real error inside DCP's exception, which wraps one of each rank."""
    if not isinstance(exc, CheckpointException):
        return exc
    first, _ = next(iter(exc.failures.values()))
    return first
