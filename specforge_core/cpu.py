"""How many CPU threads one operation uses, where a GPU does the computing."""

from __future__ import annotations

import os

import torch

FEW = 4


def use_few_threads() -> None:
    """Let an operation use at most 4 CPU threads if there is a GPU; OMP_NUM_THREADS wins.

    What is left for the CPU are copies of a few megabytes.  A thread on every core makes them
    slower (on 16 cores, 8 GB/s with 16 threads and 44 GB/s with 4), and between two of them the
    threads spin on the cores that the target's server and the data threads need.
    """
    if torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(FEW, torch.get_num_threads()))
