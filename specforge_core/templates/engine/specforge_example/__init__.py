"""The hook of the engine.  Light, for every run imports it: the engine itself is imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specforge_core import hookimpl

if TYPE_CHECKING:
    import torch

    from specforge_core.config import TargetConfig
    from specforge_core.types import TargetEngine


@hookimpl
def specforge_target_engine(target: TargetConfig, device: torch.device) -> TargetEngine | None:
    """Load the target where a run asks for this engine."""
    if target.engine != "example":
        return None
    from .engine import ExampleEngine

    return ExampleEngine.load(target, device)
