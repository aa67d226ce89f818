"""SGLang as the target engine: `target.engine: sglang`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specforge_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from specforge_core.config import TargetConfig
    from specforge_core.types import DraftServer, NotServed, TargetEngine


@hookimpl
def specforge_target_engine(target: TargetConfig, device: torch.device) -> TargetEngine | None:
    """Run the target in SGLang, when the config asks for `sglang`."""
    if target.engine != "sglang":
        return None
    from .engine import SGLangEngine

    return SGLangEngine.load(target, device)


@hookimpl
def specforge_serve(
    target: TargetConfig, export: Path, draft_tokens: int
) -> DraftServer | NotServed | None:
    """Serve an exported draft with stock SGLang, when the config asks for `sglang`."""
    if target.engine != "sglang":
        return None
    from .serve import serve

    return serve(target, export, draft_tokens)
