"""The linear example, to plant a fault in: a package whose hooks raise or return nonsense."""

from __future__ import annotations

BASE = """
from specforge_linear import *
from specforge_linear import train_step as step
from specforge_core import hookimpl
from specforge_core.errors import CheckpointError
from specforge_core.types import Draft, Ratio, StepOutput
import torch
class Odd(BaseException): ...
def odd(): raise Odd("mine")
class Text:
    spec = "text"
    def __call__(self, capture): ...
"""
