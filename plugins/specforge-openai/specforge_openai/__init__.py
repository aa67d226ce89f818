"""Servers that speak OpenAI's API, as a target engine that only generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specforge_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from specforge_core.config import TargetConfig
    from specforge_core.types import TargetEngine


@hookimpl
def specforge_target_engine(target: TargetConfig) -> TargetEngine | None:
    """Ask servers, when the config asks for `openai`."""
    if target.engine != "openai":
        return None
    from .engine import OpenAIEngine

    return OpenAIEngine.load(target)
