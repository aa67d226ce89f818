"""Every hook of specforge_core, in the order a run calls them.

A strategy is a module with hook implementations, named by an entry point in
the group `specforge.strategies`.  Only the module of the strategy that a run
names is imported, so it may import torch at the top.  Packages that cut across
strategies (an engine, a tracker, a data source) register a module under
`specforge.plugins`, and a click command under `specforge.commands`.

Hooks are never called per step; what they return is.  An implementation may
take any subset of the arguments, by name and without defaults.  Arguments are
only ever added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from .config import DataConfig, RunConfig, Section, StrategyConfig, TargetConfig, TrainConfig
    from .types import (
        Adapter,
        CaptureSpec,
        Collate,
        DataInfo,
        Draft,
        DraftServer,
        Export,
        NotServed,
        Problem,
        Proposer,
        Reader,
        Sample,
        TargetCapture,
        TargetEngine,
        TargetInfo,
        Tracker,
        TrainStep,
        Transform,
    )

PROJECT = "specforge"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# ---- config ----------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_config() -> type[StrategyConfig] | None:
    """Return the model of this strategy's `strategy:` section.

    Called when a config is loaded.  Default: no options beyond `name`.
    """


@hookspec
def specforge_plugin_config() -> type[Section] | None:
    """Return the model of the section `plugins.NAME` of a cross-cutting plugin.

    A plugin that implements this takes part in a run only where the run has that section.
    """


# ---- data ------------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_conversations(source: str, data: DataConfig) -> Iterable[Mapping[str, Any]] | None:
    """Yield the rows of one entry of `data.train`; None when it is not of this kind.

    A row has `messages` (OpenAI) or `conversations` (ShareGPT), or is tokens: `input_ids` and
    `loss_mask`.  An entry that comes back as an exception of type DataError stands for one bad
    row.  What has `num_bytes` and a method `fingerprint() -> str`, which changes with the rows,
    is tokenized once for all runs.  Default: files (JSON lines, JSON, Parquet, Arrow; packed),
    folders and patterns of them, and names of Hugging Face data sets.
    """


# ---- capture ---------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_adapter(config: StrategyConfig, target: TargetInfo) -> Adapter | None:
    """Say what to capture from the target, and how to store it.  Required."""


@hookspec(firstresult=True)
def specforge_target_engine(target: TargetConfig, device: torch.device) -> TargetEngine | None:
    """Load the target; None when `target.engine` is not the name of this engine.

    `device` is where this process computes.  Default: `transformers`, in process.
    """


@hookspec
def specforge_verify_capture(
    config: StrategyConfig,
    target: TargetInfo,
    spec: CaptureSpec,
    sample: Sample,
    fresh: TargetCapture | None,
) -> list[Problem] | None:
    """Report what is wrong with a sample.

    Called before the first sample of a run is stored or trained on, at the start of offline
    training, and for every sample by `specforge verify`.  `fresh` is the same sequence captured
    again, when the target is loaded.  Every implementation runs; the core's checks names,
    shapes, dtypes, finiteness and token ids.
    """


@hookspec(firstresult=True)
def specforge_reader(
    config: StrategyConfig, spec: CaptureSpec, target: TargetInfo, path: Path
) -> Reader | None:
    """Open a capture for offline training.  It may hold more than `spec` asks for: leave that out.

    Default: the shards that `specforge capture` wrote, of each sample the fields of `spec`.
    """


# ---- batches ---------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_transform(
    config: StrategyConfig, spec: CaptureSpec, max_length: int
) -> Transform | None:
    """Return the per-sample function of training.  Default: truncate to `max_length`.

    All that is random in training is drawn by it.
    """


@hookspec(firstresult=True)
def specforge_collate(config: StrategyConfig, spec: CaptureSpec, draft: Draft) -> Collate | None:
    """Return the function from samples to one batch.  Default: `batches.collate.pack`.

    Called once the draft has its weights, whose buffers it may read.
    """


# ---- training --------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_draft(
    config: StrategyConfig, target: TargetInfo, data: DataInfo | None
) -> Draft | None:
    """Build the draft model, seeded alike on every rank.  Required.

    `data` is None when weights, and the buffers with them, are about to be loaded.
    """


@hookspec(firstresult=True)
def specforge_train_step(config: StrategyConfig) -> TrainStep | None:
    """Return the function that computes one micro-batch's loss.  Required."""


@hookspec(firstresult=True)
def specforge_optimizers(train: TrainConfig, draft: Draft) -> list[Optimizer] | None:
    """Return the optimizers of the draft's (sharded) parameters; None when not of this name.

    `train.optimizer` names them.  Each group's `lr` is its peak.  `train.optimizer_dtype` is
    refused but for a subclass of `specforge_core.train.optim.Narrow`.  Default: `adamw`, `muon`.
    """


@hookspec(firstresult=True)
def specforge_schedule(train: TrainConfig) -> Callable[[float], float] | None:
    """Return the learning rate over its peak, by progress from 0 to 1 after the warm-up.

    None when `train.schedule` is not of this name.  Default: `constant`, `cosine`, `wsd`.
    """


@hookspec
def specforge_tracker(run: RunConfig) -> Tracker | None:
    """Return where the run's numbers go.  Every implementation runs, on rank 0 only.

    The core's own appends to `output_dir`/metrics.jsonl.
    """


# ---- evaluation and export -------------------------------------------------


@hookspec(firstresult=True)
def specforge_proposer(config: StrategyConfig, draft: Draft, target: TargetInfo) -> Proposer | None:
    """Return an object that drafts tokens, for `specforge eval`."""


@hookspec(firstresult=True)
def specforge_export(
    config: StrategyConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return what an engine of `format` loads; None when it is not supported."""


@hookspec(firstresult=True)
def specforge_import(
    config: StrategyConfig, draft: Draft, target: TargetInfo, export: Export
) -> bool | None:
    """Load an export's weights into `draft.model`; the inverse of `specforge_export`.

    Called when `--draft` names an exported directory.  True when it was loaded.
    """


@hookspec(firstresult=True)
def specforge_serve(
    target: TargetConfig, export: Path, draft_tokens: int
) -> DraftServer | NotServed | None:
    """Serve the target with an exported draft, as users of `target.engine` would.

    A chain has `draft_tokens` tokens, unless the method drafts another number at once.  What the
    engine needs to know of the method is in the export's `serve`.  None when `target.engine` is
    not the name of this engine.
    """
