"""Process groups and devices.  A world of one runs the same code as many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..process import PRIVATE
from ..progress import console
from .launch import LOCAL

T = TypeVar("T")


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

    def say(self, line: str) -> None:
        """Print a line, which all ranks would print alike, once."""
        if self.main:
            console.print(line)

    def meeting(self) -> Callable[[], object]:
        """Return what waits until all ranks have called it, and leaves GPUs alone; on all ranks."""
        return partial(dist.barrier, group=dist.new_group(backend="gloo"))

    def from_first(self, value: T) -> T:
        """Return on every rank what the first one was called with; on all ranks at once."""
        told: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(told)
        found: T = told[0]
        return found


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the process group that the launcher describes, or make one of this process alone.

    Ranks of one machine talk over its loopback interface only.
    """
    on_gpu = device.type == "cuda"
    backend, bound = ("nccl", device) if on_gpu else ("gloo", None)
    if on_gpu:
        torch.cuda.set_device(device)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == size:
        for name, interface in LOCAL.items():
            os.environ.setdefault(name, interface)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=bound)
    elif (directory := os.environ.get(PRIVATE)) is not None:
        store = FileStore(str(Path(directory) / "store"), size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=bound)
    else:
        dist.init_process_group(backend, device_id=bound)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    except BaseException:
        # to take down a group whose other ranks go on would wait for them: this process ends
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
