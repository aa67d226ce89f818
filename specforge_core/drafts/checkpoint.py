"""Read checkpoints: tensors in DCP's safetensors storage, all else in state.json, no pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ..errors import CheckpointError
from ..types import Draft

STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything a resumed run needs that is no tensor."""

    step: int  # optimizer steps done
    total_steps: int  # that the schedule of learning rates was over
    num_tokens: int  # trained on, by all ranks
    seconds: float  # spent training
    strategy: str
    position: int  # samples of the endless sequence of epochs done with
    config: dict[str, Any]
    versions: dict[str, str]
    identity: dict[str, Any]  # of the capture: target, layers, tokenizer, template
    machine: dict[str, Any] = field(default_factory=dict)  # dtypes and threads it computed with


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in output_dir.glob(f"checkpoints/step-*/{STATE}"))


def load_model(path: Path, draft: Draft) -> TrainState:
    """Restore an unsharded draft's weights, without a process group."""
    state = read_state(path)
    values = draft.model.state_dict()
    wanted: dict[str, Any] = {f"model.{k}": v for k, v in values.items() if draft.saved(k)}
    check_shapes(path, wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    draft.model.load_state_dict(values | under(wanted, "model."))
    return state


def read_state(path: Path) -> TrainState:
    """Read a checkpoint's state.json."""
    try:
        return TrainState(**_current(json.loads((path / STATE).read_text(encoding="utf-8"))))
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {STATE}. Try: --checkpoint OUTPUT_DIR"
        ) from exc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{path / STATE} is damaged: {exc}. Use an earlier one") from exc


def _current(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as this version writes it; 0.1 counted every rank's samples apart."""
    if "positions" not in state:
        return state
    kept = {k: v for k, v in state.items() if k not in ("positions", "generators", "world_size")}
    position = min(state["positions"]) * state["world_size"]
    total = state["config"]["train"]["max_steps"] or state["step"]
    return {"total_steps": total, **kept, "position": position}


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

    Raises CheckpointError naming the first tensor that is missing, left over or another size.
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
    left_over = [n for n in stored if n.startswith("model.") and n not in wanted]
    for name, tensor in [*wanted.items(), *((n, None) for n in left_over)]:
        if tensor is None:
            problem = "is in it, and not in this run's draft"
        elif name not in stored:
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


def under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
