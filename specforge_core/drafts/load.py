"""Bring a draft to life: new, from a checkpoint or an export, and into an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import ConfigError
from ..load import validate
from ..strategy import Strategy
from ..target.info import load_target_info
from ..types import DataInfo, Draft, TargetInfo
from .checkpoint import check_strategy, checkpoints, find, load_model, read_state
from .export import read_export, write_export


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
    if not (path / "config.json").exists():
        checkpoint = find(path)
        check_strategy(checkpoint, read_state(checkpoint), strategy.name)
    return Restored(load_draft(run, strategy, target, path), target)


def load_draft(run: RunConfig, strategy: Strategy, target: TargetInfo, path: Path) -> Draft:
    """Build the draft with the weights at `path`, whichever strategy trained them.

    Raises CheckpointError when they have other names or shapes.
    """
    draft = strategy.draft(run.strategy, target, None)
    if (path / "config.json").exists():
        strategy.load_export(run.strategy, draft, target, read_export(path))
    else:
        load_model(find(path), draft)
    return draft


def first_draft(run: RunConfig, strategy: Strategy, target: TargetInfo, data: DataInfo) -> Draft:
    """Build the draft that training begins with; a resumed run fills it from its checkpoint.

    Raises ConfigError when `train.init_from` names other weights than this run began with.
    """
    path, started = run.train.init_from, checkpoints(run.output_dir)
    if path is None or started:
        draft = strategy.draft(run.strategy, target, data)
    else:
        draft = load_draft(run, strategy, target, path)
    if path is not None and started:
        before = read_state(started[-1]).config["train"].get("init_from")
        if before != str(path):
            raise ConfigError(
                f"train.init_from is {str(path)!r}, but the run in {run.output_dir} already began "
                f"from {repr(before) if before else 'new weights'} and would be resumed. "
                "Try: output_dir=ANOTHER"
            )
    return draft


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
        "capture": state.identity.model_dump(mode="json"),
    }
    write_export(export, output, provenance=provenance, force=force)
    return output
