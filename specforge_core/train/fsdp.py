"""Shard a draft with FSDP2: float32 masters, compute in a narrower type."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..types import Draft


def shard(draft: Draft, mesh: DeviceMesh, compute_dtype: torch.dtype) -> FSDPModule:
    """Shard `draft.model` in place over `mesh`: each of `draft.shard`, then the root.

    Gradients are reduced in float32 and averaged over the ranks; the trainer
    rescales them by `world size / global weight`.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    # alone, gathering again in backward would only repeat the cast
    reshard = mesh.size() > 1
    for unit in draft.shard:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = fully_shard(draft.model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    assert isinstance(root, FSDPModule)
    return root
