"""Checkpoints: tensors in DCP's safetensors storage, all else in state.json, no pickle.

A checkpoint is written into a hidden directory beside its place and renamed when
whole, so `step-000100` either is complete or is not there.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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
from torch.optim import Optimizer

from ..errors import CheckpointError, RunError

STATE = "state.json"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything a resumed run needs that is no tensor."""

    step: int  # optimizer steps done
    total_steps: int  # that the schedule of learning rates was over
    num_tokens: int  # trained on, by all ranks
    seconds: float  # spent training
    strategy: str
    world_size: int
    positions: list[int]  # of each rank's sample stream
    generators: list[str]  # of each rank, base64
    config: dict[str, Any]
    versions: dict[str, str]
    identity: dict[str, Any]  # of the capture: target, layers, tokenizer, template
    machine: dict[str, Any] = field(default_factory=dict)  # dtypes and threads it computed with


def encode_generator(generator: torch.Generator) -> str:
    """Return a generator's state as text."""
    return base64.b64encode(generator.get_state().numpy().tobytes()).decode()


def decode_generator(text: str) -> Tensor:
    """Return the state that `encode_generator` wrote, for `Generator.set_state`."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in output_dir.glob(f"checkpoints/step-*/{STATE}"))


def save(
    output_dir: Path, model: nn.Module, optimizers: list[Optimizer], state: TrainState, keep: int
) -> Path:
    """Write one checkpoint from all ranks; rank 0 renames it into place and drops old ones.

    Raises RunError on every rank when any rank could not write (a full disk); the
    checkpoints that were there before stay.
    """
    final = output_dir / "checkpoints" / f"step-{state.step:08d}"
    beside = final.with_name(f".{final.name}.tmp")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    tensors = {k: v for k, v in _collect(model, optimizers).items() if isinstance(v, Tensor)}
    try:
        storage = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        dcp_save(tensors, storage_writer=storage)
        if main:
            text = json.dumps(asdict(state), indent=1)
            with (beside / STATE).open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
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


def load(path: Path, model: nn.Module, optimizers: list[Optimizer]) -> TrainState:
    """Restore a sharded model and its optimizers in place; the world size may differ."""
    state = read_state(path)
    tensors = _collect(model, optimizers)
    wanted = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
    check_shapes(path, wanted)
    dcp_load(wanted, storage_reader=HuggingFaceStorageReader(str(path)))
    tensors |= wanted
    set_model_state_dict(model, _under(tensors, "model."))
    for number, optimizer in enumerate(optimizers):
        values = _under(tensors, f"optim{number}.")
        set_optimizer_state_dict(model, optimizer, values, options=_FLAT)
    return state


def load_model(path: Path, model: nn.Module) -> TrainState:
    """Restore an unsharded model's weights, without a process group."""
    state = read_state(path)
    wanted: dict[str, Any] = {f"model.{k}": v for k, v in model.state_dict().items()}
    check_shapes(path, wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    model.load_state_dict(_under(wanted, "model."))
    return state


def read_state(path: Path) -> TrainState:
    """Read a checkpoint's state.json."""
    try:
        return TrainState(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {STATE}. Try: --checkpoint OUTPUT_DIR"
        ) from exc
    except (ValueError, TypeError) as exc:
        raise CheckpointError(f"{path / STATE} is damaged: {exc}. Use an earlier one") from exc


def check_strategy(path: Path, state: TrainState, name: str) -> None:
    """Raise CheckpointError when a checkpoint was trained with another strategy."""
    if state.strategy != name:
        raise CheckpointError(
            f"{path} was trained with strategy {state.strategy!r}, this run is {name!r}. "
            f"Try: strategy.name={state.strategy}, or another output_dir"
        )


def find(path: Path) -> Path:
    """Return a checkpoint directory: `path` itself, or the newest one of a run at `path`."""
    if (path / STATE).exists():
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} holds no complete checkpoint. "
            f"Try: specforge train -c RUN.yaml output_dir={path}"
        )
    return found[-1]


def check_shapes(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Compare the stored tensors' names and shapes with those of the draft and optimizer.

    Raises CheckpointError naming the first tensor that is missing or another size.
    """
    stored: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            found = _extents(file)
        except (SafetensorError, OSError, ValueError) as exc:
            raise CheckpointError(
                f"{file} is damaged: {exc}. Delete {path} to use the checkpoint before it"
            ) from exc
        for name, ends in found.items():
            before = stored.get(name, ends)
            stored[name] = [max(a, b) for a, b in zip(before, ends, strict=True)]
    for name, tensor in wanted.items():
        if name not in stored:
            problem = "is not in it"
        elif stored[name] != list(tensor.shape):
            problem = f"has shape {stored[name]} in it, and {list(tensor.shape)} in this run"
        else:
            continue
        raise CheckpointError(
            f"checkpoint {path} does not fit this run's draft: {name} {problem}. "
            "Use the strategy section it was trained with, or another output_dir"
        )


def _extents(file: Path) -> dict[str, list[int]]:
    """Return how far one rank's part of each tensor reaches, per axis."""
    found = {}
    with safe_open(str(file), framework="pt") as tensors:
        layout = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
            shape = list(tensors.get_slice(name).get_shape())
            offsets = layout.get(name, {}).get("saved_offsets") or [0] * len(shape)
            found[name] = [o + s for o, s in zip(offsets, shape, strict=True)]
    return found


def _collect(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    found: dict[str, Any] = {f"model.{k}": v for k, v in get_model_state_dict(model).items()}
    for number, optimizer in enumerate(optimizers):
        values = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        found |= {f"optim{number}.{k}": v for k, v in values.items()}
    return found


def _under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _cause(exc: BaseException) -> BaseException:
    """Return the first real error inside DCP's exception, which wraps one of each rank."""
    if not isinstance(exc, CheckpointException):
        return exc
    first, _ = next(iter(exc.failures.values()))
    return first
