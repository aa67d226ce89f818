"""Shard a draft with FSDP2: float32 masters, compute in a narrower type."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..types import Draft

# of gathered weights, up to which they stay gathered until the backward has used them: gathering
# them again costs a small draft more time than a large card has use for their room
KEPT_BYTES = 4 << 30


def shard(draft: Draft, mesh: DeviceMesh, compute_dtype: torch.dtype) -> FSDPModule:
    """Shard `draft.model` in place over `mesh`: each of `draft.shard`, then the root.

    Gradients are reduced in float32 and averaged over the ranks; the trainer
    rescales them by `world size / global weight`.  A draft of more than `KEPT_BYTES` is freed
    after its forward pass and gathered again for the backward.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    size = sum(p.numel() for p in draft.model.parameters()) * compute_dtype.itemsize
    # alone, gathering again in backward would only repeat the cast
    reshard = mesh.size() > 1 and size > KEPT_BYTES
    for unit in draft.shard:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = fully_shard(draft.model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    assert isinstance(root, FSDPModule)
    return root


def cast_inputs(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Have an unsharded model compute on what FSDP's mixed precision would give it."""
    model.register_forward_pre_hook(partial(_cast, compute_dtype), with_kwargs=True)


def _cast(
    dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def plain(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}
