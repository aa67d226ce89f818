"""The linear example, to plant a fault in: a package whose hooks raise or return nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specforge_core.config import DataConfig, StrategyConfig, TargetConfig, TrainConfig
from specforge_core.strategy import Strategy
from specforge_core.testing.plugin import FakeSite
from specforge_core.types import CaptureSpec, Draft, Prompt, TargetInfo

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
VALUES = """
from types import SimpleNamespace
from specforge_core.types import *
from torch import nn
TOKENS = Field(shape=(None,), dtype="int64")
FIELDS = {"input_ids": TOKENS}
LINEAR = nn.Linear(2, 2)
ONE = torch.ones(2)
def adapter(**fields):
    spec = CaptureSpec(**{"layers": (1,), "fields": FIELDS, **fields})
    return type("Adapter", (), {"spec": spec, "__call__": None})()
def draft_of(**fields):
    return Draft(**{"model": nn.Sequential(LINEAR), **fields})
def export(**fields):
    return Export(**{"config": {}, "weights": {"w": ONE}, **fields})
def objects(**members):  # of this package, with functions as methods
    return type("Mine", (), {k: staticmethod(v) if callable(v) else v for k, v in members.items()})
"""
CONFIG = StrategyConfig(name="bad")
SPEC = CaptureSpec(layers=(), fields={})
TARGET = TargetInfo(
    name_or_path="x", revision=None, hidden_size=8, num_layers=2, vocab_size=9, config={}
)
DRAFT = Draft(model=torch.nn.Linear(1, 1))


def bad(site: FakeSite, hook: str, arguments: str, body: str, more: str = "") -> Strategy:
    """Load the linear example with another hook; `more` stands before it."""
    hook = f"@hookimpl\ndef specforge_{hook}({arguments}):\n    {body}\n"
    site.strategy("bad", f"{BASE}{more}\n{hook}")
    return Strategy.load("bad")


CALLS: dict[str, tuple[Any, ...]] = {
    "config": (),
    "conversations": ("a.jsonl", DataConfig()),
    "adapter": (CONFIG, TARGET),
    "target_engine": (TargetConfig(path="x"), torch.device("cpu")),
    "verify_capture": (CONFIG, TARGET, SPEC, {}, None),
    "reader": (CONFIG, SPEC, TARGET, Path("here")),
    "transform": (CONFIG, SPEC, 8),
    "collate": (CONFIG, SPEC, DRAFT),
    "draft": (CONFIG, TARGET, None),
    "train_step": (CONFIG,),
    "optimizers": (TrainConfig(), DRAFT),
    "schedule": (TrainConfig(),),
    "proposer": (CONFIG, DRAFT, TARGET),
    "export": (CONFIG, DRAFT, TARGET, "hf"),
}
PROMPT = Prompt(index=3, input_ids=torch.arange(4), loss_mask=torch.ones(4).long())
ASKED = CaptureSpec(layers=(1,), final="pre_norm", logsumexp=True, fields={})
CAPTURE = (
    "TargetCapture(**{'index': 3, 'input_ids': torch.arange(4), 'loss_mask': torch.ones(4).long(), "
    "'hidden_states': {1: torch.ones(4, 2)}, 'final': torch.ones(4, 2), "
    "'logsumexp': torch.ones(4), **dict(%s)})"
)
GENERATED = "Generated(**{'index': 3, 'tokens': (1,), 'finished': True, **dict(%s)})"
