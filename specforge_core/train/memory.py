"""What a device's memory went to when it did not suffice, and what to ask less of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import RunConfig
from ..errors import RunError
from ..text import cut, in_units
from ..types import Draft, TargetEngine
from .fsdp import KEPT_BYTES

REST = "a step's states, logits and what is kept for its backward pass"
TARGET = "the target"
FROZEN = "the target's embedding and head"
GRADIENTS = "their gradients"
GATHERED = "the weights as they are computed with"
STATES = "the optimizer's states"


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
        GRADIENTS: [p.grad for p in weights],
        STATES: states,
        FROZEN: frozen,
        TARGET: target,
    }
    return {name: sum(_bytes(value, device) for value in values) for name, values in held.items()}


def estimate(
    draft: Draft,
    optimizers: Iterable[Optimizer],
    engine: TargetEngine | None,
    step: Mapping[str, int] | None,
    run: RunConfig,
    ranks: int,
    item: int,
) -> dict[str, int]:
    """Return the bytes that a rank will hold when it holds most, by what they are for.

    The draft and its optimizers are those of one rank, after a step.  `step` is what the step holds
    (`types.Planned`), of which nothing may be known; `item` are the bytes of a number in it.
    """
    shards = run.train.shard_size or ranks
    device = next(draft.model.parameters()).device
    found = parts(draft, optimizers, engine, device)
    held = {
        name: size if name in (FROZEN, TARGET) else -(-size // shards)
        for name, size in found.items()
    }
    weights = sum(p.numel() for p in draft.model.parameters())
    units = [sum(p.numel() for p in unit.parameters()) for unit in draft.shard]
    root = weights - sum(units)  # gathered and reduced together
    kept = item * weights
    if shards > 1 and kept > KEPT_BYTES:
        kept = item * (root + 2 * max(units, default=0))
    # whole gradients come when a step's states have gone: of the last that are reduced a rank
    # has what it computed, and its copy in float32
    trained = sum(p.numel() for p in draft.model.parameters() if p.requires_grad)
    gradients = -(-4 * trained // shards) + (item + 4) * max(root, *units, 0)
    states = dict(step or {})
    if run.train.accumulate > 1:  # then they are there throughout
        states[GRADIENTS] = -(-4 * trained // shards)
    elif run.train.recompute and (done := before_last(draft)):
        states[GRADIENTS] = -(-4 * done // shards)
    if sum(states.values()) < gradients:
        states = {GRADIENTS: gradients}
    held.pop(GRADIENTS)
    return held | {GATHERED: kept} | states


def before_last(draft: Draft) -> int:
    """Return how many weights have their gradients when the last unit is made again.

    A step with `train.recompute` holds most then, since states do not become fewer meanwhile.
    """
    units = [sum(p.numel() for p in u.parameters() if p.requires_grad) for u in draft.shard]
    return sum(units) - max(units, default=0)


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
    if largest == STATES and train.optimizer_dtype == "float32":
        return "Try: train.optimizer_dtype=bfloat16, or --nproc N on more GPUs"
    if largest != REST:
        return "Try: --nproc N on more GPUs, which share these, or a smaller draft"
    if train.batch_tokens is not None and train.batch_tokens >= 2 * run.data.max_length:
        half = train.batch_tokens // 2
        again = f"train.batch_tokens={half} train.accumulate={train.accumulate * 2}"
        return f"Try: {again}, which trains on as many tokens a step{_again(run)}"
    if train.batch_tokens is None and train.batch_size > 1:
        half = train.batch_size // 2
        again = f"train.batch_size={half} train.accumulate={train.accumulate * 2}"
        return f"Try: {again}, which trains on the same samples a step{_again(run)}"
    return (
        f"Try: data.max_length={max(1, run.data.max_length // 2)}, or the strategy's options that "
        f"bound what it computes at a time: specforge check {run.strategy.name}{_again(run)}"
    )


def _again(run: RunConfig) -> str:
    return "" if run.train.recompute else "; or train.recompute=true"
