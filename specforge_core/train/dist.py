"""Process groups and devices.  A world of one runs the same code as many."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the process group that the launcher describes, or make one of this process alone."""
    on_gpu = device.type == "cuda"
    backend, bound = ("nccl", device) if on_gpu else ("gloo", None)
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=bound)
    else:
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()


def relaunch(nproc: int, arguments: Sequence[str]) -> None:
    """Replace this process by torch's elastic launcher with `nproc` ranks of the same command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command = [sys.executable, *launcher, "-m", "specforge_core.cli", *arguments]
    os.execv(sys.executable, command)
