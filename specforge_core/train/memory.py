"""What a device's memory went to when it did not suffice, and what to ask less of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..capture.estimate import in_units
from ..config import RunConfig
from ..errors import RunError
from ..text import cut
from ..types import Draft, TargetEngine

REST = "a step's states, logits and what is kept for its backward pass"
TARGET = "the target"


def too_little(
    exc: BaseException,
    run: RunConfig,
    draft: Draft,
    optimizers: Iterable[Optimizer],
    engine: TargetEngine | None,
    device: torch.device,
) -> RunError:
    """Return what to raise instead of torch's OutOfMemoryError."""
    found = parts(draft, optimizers, engine, device)
    rest = 0
    where = str(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        where = f"cuda:{index}, which has {in_units(total)}"
        rest = max(0, torch.cuda.max_memory_allocated(index) - sum(found.values()))
        found[REST] = rest
    listed = sorted(found.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {in_units(size)}" for name, size in listed if size)
    largest = listed[0][0] if device.type == "cuda" else REST
    return RunError(
        f"there is too little memory on {where}: {told}. {_advice(largest, run)}\n"
        f"{cut(str(exc), 300)}".strip()
    )


def parts(
    draft: Draft,
    optimizers: Iterable[Optimizer],
    engine: TargetEngine | None,
    device: torch.device,
) -> dict[str, int]:
    """Return the bytes on a device of what stays there from one step to the next."""
    weights = list(draft.model.parameters())
    states = (
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
    )
    frozen = () if draft.frozen is None else tuple(draft.frozen.parameters())
    model = getattr(engine, "model", None)
    target = model.parameters() if isinstance(model, nn.Module) else ()
    held: dict[str, Iterable[object]] = {
        "the draft's weights in float32": weights,
        "their gradients": [p.grad for p in weights],
        "the optimizer's states": states,
        "the target's embedding and head": frozen,
        TARGET: target,
    }
    return {name: sum(_bytes(value, device) for value in values) for name, values in held.items()}


def _bytes(value: object, device: torch.device) -> int:
    if not isinstance(value, Tensor) or value.device.type != device.type:
        return 0
    return (value.to_local() if isinstance(value, DTensor) else value).nbytes


def _advice(largest: str, run: RunConfig) -> str:
    train = run.train
    if largest == TARGET:
        return (
            "Try: specforge capture first, then data.capture_dir=DIR; or target.device=cuda:1, a "
            "GPU of its own"
        )
    if largest != REST:
        return "Try: --nproc N on more GPUs, which share these, or a smaller draft"
    if train.batch_size > 1:
        half = train.batch_size // 2
        again = f"train.batch_size={half} train.accumulate={train.accumulate * 2}"
        return f"Try: {again}, which trains on the same samples a step"
    return (
        f"Try: data.max_length={max(1, run.data.max_length // 2)}, or the strategy's options that "
        f"bound what it computes at a time: specforge check {run.strategy.name}"
    )
