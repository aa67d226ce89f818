"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import TrainConfig
from ..cpu import pick_dtype
from ..errors import ConfigError, PluginError
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


KEPT = torch.bfloat16
# of a state that is kept so: per step it moves by (1 - beta) of its distance from what it follows,
# and less than half a unit in its last place, 0.4 % of it, is rounded away
LARGEST_BETA = 0.98
CHUNK = 1 << 26  # numbers of parameters whose states are float32 at a time

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


class Narrow(Optimizer):
    """An optimizer whose states are kept in bfloat16, and are float32 while it uses them.

    They are rounded to the nearest, not at random: what is kept then hangs on nothing but the
    gradients, so that ranks that hold the same numbers keep the same, and a resumed run goes on
    exactly.  No parameter's own step is changed by it: weights stay float32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter, a few at a time; a closure is not supported."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for params in _chunks(group["params"]):
                    self.param_groups = [group | {"params": params}]
                    self._keep(params, torch.float32)
                    super().step()
                    self._keep(params, KEPT)
        finally:
            self.param_groups = groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was kept, which torch makes as wide as the parameters."""
        super().load_state_dict(state_dict)
        self._keep(list(self.state), KEPT)

    def _keep(self, params: list[Tensor], dtype: torch.dtype) -> None:
        for param in params:
            state = self.state.get(param, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.is_floating_point():
                    state[name] = value.to(dtype)


class NarrowAdamW(Narrow, torch.optim.AdamW):
    """torch's AdamW, its moments kept in bfloat16."""


class NarrowMuon(Narrow, torch.optim.Muon):
    """torch's Muon, its momentum kept in bfloat16."""


class NarrowFloat32Muon(Narrow, Float32Muon):
    """The same with iterations in float32."""


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters that have a gradient, some of them at a time."""
    chunk: list[Tensor] = []
    for param in params:
        if param.grad is not None:
            chunk.append(param)
        if sum(p.numel() for p in chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def build_optimizers(draft: Draft, config: TrainConfig) -> list[Optimizer]:
    """Return the optimizers of a draft's (sharded) parameters.

    Muon takes the matrices of the draft's hidden layers, which its orthogonalised update is
    meant for; the rest stays with AdamW.  Both decay matrices only, of two axes or more, and of
    them those that the draft lets them.
    """
    params = {n: p for n, p in draft.model.named_parameters() if p.requires_grad}
    hidden = {id(p) for unit in draft.hidden_units for p in unit.parameters() if p.ndim == 2}
    muon = (
        {n: p for n, p in params.items() if id(p) in hidden} if config.optimizer == "muon" else {}
    )
    if config.optimizer == "muon" and not muon:
        raise ConfigError(
            "train.optimizer is muon, but this draft names no hidden layer with a matrix for it. "
            "Try: train.optimizer=adamw"
        )
    rest = {n: p for n, p in params.items() if n not in muon}
    narrow = config.optimizer_dtype == "bfloat16"
    if narrow and max(config.betas) > LARGEST_BETA:
        raise ConfigError(
            f"train.betas has {max(config.betas)}: a moment that moves so little in a step is "
            "rounded back to what it was in bfloat16. Try: train.optimizer_dtype=float32, or "
            f"train.betas=[0.9,0.95], up to {LARGEST_BETA}"
        )
    adamw = (NarrowAdamW if narrow else torch.optim.AdamW)(
        _groups(rest, draft, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # takes `found_inf`: a bad step is left out on the device
    )
    optimizers: list[Optimizer] = [adamw]
    if muon:
        quick = pick_dtype("auto", next(iter(muon.values())).device) == torch.bfloat16
        kind: type[torch.optim.Muon] = torch.optim.Muon if quick else Float32Muon
        if narrow:
            kind = NarrowMuon if quick else NarrowFloat32Muon
        groups = _groups(muon, draft, config.weight_decay)
        optimizers.append(kind(groups, lr=config.muon_learning_rate))
    return optimizers


def _groups(
    params: Mapping[str, nn.Parameter], draft: Draft, weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not; neither group is empty."""
    shrinks = {name: p.ndim >= 2 and draft.decayed(name) for name, p in params.items()}
    return [
        {"params": chosen, "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        if (chosen := [p for name, p in params.items() if shrinks[name] is decays])
    ]


def check_kept(optimizers: list[Optimizer], config: TrainConfig) -> None:
    """Raise ConfigError where states would not be kept as `train.optimizer_dtype` says.

    A package's optimizer keeps them so as a subclass of `Narrow` and its own.
    """
    wide = [one for one in optimizers if not isinstance(one, Narrow)]
    if config.optimizer_dtype == "bfloat16" and wide:
        raise ConfigError(
            f"train.optimizer_dtype is bfloat16, and {type(wide[0]).__name__}, which "
            f"train.optimizer={config.optimizer} comes to, keeps its states as it likes. "
            "Try: train.optimizer_dtype=float32, or train.optimizer=adamw"
        )


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


def square_norm(grads: list[Tensor], package: str) -> Tensor:
    """Return the sum of squares of this rank's gradients, a scalar on their device.

    `package` is the step's.  Raises PluginError where there is no gradient.
    """
    if not grads:
        raise PluginError(
            f"{package}, specforge_train_step: no trained parameter got a gradient. Compute the "
            "loss from what draft.model(...) returns"
        )
    norms = torch._foreach_norm([g for g in grads if g.numel()])
    return torch.stack(list(norms)).double().square().sum()
