"""Where a draft's first weights come from."""

from __future__ import annotations

from pathlib import Path

from ..config import RunConfig
from ..errors import ConfigError
from ..export.writer import read_export
from ..strategy import Strategy
from ..types import Draft, TargetInfo
from .checkpoint import check_strategy, checkpoints, find, load_model, read_state
from .feed import Feed


def load_draft(run: RunConfig, strategy: Strategy, target: TargetInfo, path: Path) -> Draft:
    """Build the draft with the weights at `path`: a run, one checkpoint, or an export.

    Raises CheckpointError when they belong to another strategy or have other shapes.
    """
    if (path / "config.json").exists():
        draft = strategy.draft(run.strategy, target, None, None)
        strategy.load_export(run.strategy, draft, target, read_export(path))
        return draft
    checkpoint = find(path)
    check_strategy(checkpoint, read_state(checkpoint), strategy.name)
    draft = strategy.draft(run.strategy, target, None, None)
    load_model(checkpoint, draft.model)
    return draft


def first_draft(run: RunConfig, strategy: Strategy, feed: Feed) -> Draft:
    """Build the draft that training begins with; a resumed run fills it from its checkpoint.

    Raises ConfigError when `train.init_from` names other weights than this run began with.
    """
    path, started = run.train.init_from, checkpoints(run.output_dir)
    if path is None or started:
        draft = strategy.draft(run.strategy, feed.target, feed.manifest, feed.token_counts)
    else:
        draft = load_draft(run, strategy, feed.target, path)
    if path is not None and started:
        before = read_state(started[-1]).config["train"].get("init_from")
        if before != str(path):
            raise ConfigError(
                f"train.init_from is {str(path)!r}, but the run in {run.output_dir} already began "
                f"from {repr(before) if before else 'new weights'} and would be resumed. "
                "Try: output_dir=ANOTHER"
            )
    return draft
