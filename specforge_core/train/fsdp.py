"""Shard a draft with FSDP2: float32 masters, compute in a narrower type."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..errors import ConfigError
from ..types import Draft

# of gathered weights, up to which they stay gathered until the backward has used them: gathering
# them again costs a small draft more time than a large card has use for their room
KEPT_BYTES = 4 << 30


def shards_of(ranks: DeviceMesh, shard_size: int | None) -> DeviceMesh:
    """Return the mesh that a draft is sharded over: all ranks, or [replicas, shards].

    A rank gathers weights from the `shard_size` ranks beside it, and the replicas meet once a step,
    for the gradients: so where links differ in speed, most goes over the fast ones.
    """
    count = ranks.size()
    size = check_shards(count, shard_size)
    if size == count:
        return ranks
    names = ("replicas", "shards")
    return init_device_mesh(ranks.device_type, (count // size, size), mesh_dim_names=names)


def check_shards(count: int, shard_size: int | None) -> int:
    """Return over how many of `count` ranks a copy of the draft is cut.

    Raises ConfigError where that does not divide them.
    """
    size = shard_size or count
    if count % size:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"train.shard_size={size} does not divide the {count} rank(s) of this run. "
            f"Try: train.shard_size={max(n for n in fits if n <= size)}"
        )
    return size


def shard(draft: Draft, mesh: DeviceMesh, compute_dtype: torch.dtype) -> FSDPModule:
    """Shard `draft.model` in place over the last axis of `mesh`: each of `draft.shard`, the root.

    Gradients are reduced in float32 and averaged over the ranks; the trainer
    rescales them by `world size / global weight`.  A draft of more than `KEPT_BYTES` is freed
    after its forward pass and gathered again for the backward.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    size = sum(p.numel() for p in draft.model.parameters()) * compute_dtype.itemsize
    # alone, gathering again in backward would only repeat the cast
    reshard = mesh.size(mesh.ndim - 1) > 1 and size > KEPT_BYTES
    for unit in draft.shard:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = fully_shard(draft.model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    assert isinstance(root, FSDPModule)
    for module in draft.model.modules():
        # torch.compile would take whole numbers of a module with this mark, as its head size, for
        # symbols: nearly twice the tracing, and kernels that do not know them
        vars(module).pop("_is_fsdp_managed_module", None)
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
