"""Bring a trained draft back: from a checkpoint, from an export, and into an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .capture.hf import load_target_info
from .config import RunConfig, validate
from .export.writer import write_export
from .strategy import Strategy
from .train.checkpoint import find, read_state
from .train.initial import load_draft
from .types import Draft, TargetInfo


@dataclass(frozen=True, slots=True)
class Restored:
    """A draft with its weights, and the target it was made for."""

    draft: Draft
    target: TargetInfo


def restore(run: RunConfig, strategy: Strategy, path: Path) -> Restored:
    """Load the draft at `path`: a run's output, one checkpoint, or an exported directory.

    Raises CheckpointError when it belongs to another strategy or has other shapes.
    """
    target = load_target_info(run.target)
    return Restored(load_draft(run, strategy, target, path), target)


def export_checkpoint(path: Path, format: str, output: Path, *, force: bool) -> Path:
    """Write the draft of a checkpoint in `format`, with its provenance beside it."""
    checkpoint = find(path)
    state = read_state(checkpoint)
    run, strategy = validate(state.config, f"the config stored in {checkpoint}")
    restored = restore(run, strategy, checkpoint)
    export = strategy.export(run.strategy, restored.draft, restored.target, format)
    provenance: dict[str, Any] = {
        "strategy": state.strategy,
        "format": format,
        "versions": state.versions,
        "step": state.step,
        "tokens": state.num_tokens,
        "config": state.config,
        "capture": state.identity,
    }
    write_export(export, output, provenance=provenance, force=force)
    return output
