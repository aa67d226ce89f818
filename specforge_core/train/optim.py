"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import TrainConfig
from ..cpu import pick_dtype
from ..errors import ConfigError
from ..types import Draft
from .muon import Float32Muon


def constant(progress: float, config: TrainConfig) -> float:
    """Stay at the peak."""
    return 1.0


def cosine(progress: float, config: TrainConfig) -> float:
    """Fall along half a cosine to `min_lr_ratio`."""
    low = config.min_lr_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, config: TrainConfig) -> float:
    """Stay, then fall linearly to `min_lr_ratio` over the last `decay_ratio` of the steps."""
    falling = max(0.0, (progress - (1 - config.decay_ratio)) / config.decay_ratio)
    return 1 - (1 - config.min_lr_ratio) * falling


SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}


def lr_factor(
    step: float, total_steps: float, config: TrainConfig, schedule: Callable[[float], float]
) -> float:
    """Return the learning rate of `step`, from 0, over its peak: a warm-up, then the schedule.

    Both may lie between two steps: a run that is limited in time stands further than it has
    counted, and one of some epochs counts its samples in steps of their present size.
    """
    warmup = config.warmup_ratio * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return schedule(min(progress, 1.0))


def build_optimizers(draft: Draft, config: TrainConfig) -> list[Optimizer]:
    """Return the optimizers of a draft's (sharded) parameters.

    AdamW decays matrices only.  Muon takes the matrices of the draft's hidden layers, which its
    orthogonalised update is meant for; the rest stays with AdamW.
    """
    params = [p for p in draft.model.parameters() if p.requires_grad]
    hidden = {id(p) for unit in draft.hidden_units for p in unit.parameters() if p.ndim == 2}
    muon = [p for p in params if id(p) in hidden] if config.optimizer == "muon" else []
    if config.optimizer == "muon" and not muon:
        raise ConfigError(
            "train.optimizer is muon, but this draft names no hidden layer with a matrix for it. "
            "Try: train.optimizer=adamw"
        )
    taken = {id(p) for p in muon}
    rest = [p for p in params if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # takes `found_inf`: a bad step is left out on the device
    )
    optimizers: list[Optimizer] = [adamw]
    if muon:
        quick = pick_dtype("auto", muon[0].device) == torch.bfloat16
        kind = torch.optim.Muon if quick else Float32Muon
        optimizers.append(
            kind(muon, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        )
    return optimizers


def remember_peaks(optimizers: list[Optimizer]) -> None:
    """Take each group's learning rate as its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def local_gradients(model: nn.Module) -> list[Tensor]:
    """Return this rank's parts of all gradients, as plain tensors that share their memory."""
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def square_norm(grads: list[Tensor]) -> Tensor:
    """Return the sum of squares of this rank's gradients, a scalar on their device."""
    norms = torch._foreach_norm([g for g in grads if g.numel()])
    return torch.stack(list(norms)).double().square().sum()
