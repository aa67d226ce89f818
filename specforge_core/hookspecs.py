"""Every hook of specforge_core, in the order a run calls them.

A strategy is a module with hook implementations, named by an entry point in
the group `specforge.strategies`.  Only the module of the strategy that a run
names is imported, so it may import torch at the top.

Hooks that return something are called once per run, never per step.  An
implementation may take any subset of the arguments, by name and without
defaults.  Arguments are only ever added.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from .capture.manifest import CaptureManifest
    from .config import StrategyConfig, TargetConfig
    from .types import (
        Adapter,
        CaptureSpec,
        Collate,
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


# ---- capture ---------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_adapter(config: StrategyConfig, target: TargetInfo) -> Adapter | None:
    """Say what to capture from the target, and how to store it.  Required."""


@hookspec(firstresult=True)
def specforge_target_engine(target: TargetConfig) -> TargetEngine | None:
    """Load the target; None when `target.engine` is not the name of this engine.

    Called by capture, online training and verification.  Default:
    `transformers`, in process.
    """


@hookspec
def specforge_verify_capture(
    config: StrategyConfig,
    spec: CaptureSpec,
    manifest: CaptureManifest,
    sample: Sample,
    fresh: TargetCapture | None,
) -> list[Problem] | None:
    """Report what is wrong with a sample.

    Called before the first sample of a run is stored or trained on, at the start
    of offline training, and by `specforge verify`.  `fresh` is the same sequence
    captured again, when the target is loaded.  Every implementation runs; the
    core's checks names, shapes, dtypes, finiteness and token ids.
    """


# ---- data ------------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_reader(
    config: StrategyConfig, spec: CaptureSpec, manifest: CaptureManifest, path: Path
) -> Reader | None:
    """Open a capture for offline training.  Default: the shards capture wrote."""


@hookspec(firstresult=True)
def specforge_transform(
    config: StrategyConfig, spec: CaptureSpec, max_length: int, training: bool
) -> Transform | None:
    """Return the per-sample function of training.  Default: truncate to `max_length`."""


@hookspec(firstresult=True)
def specforge_collate(config: StrategyConfig, spec: CaptureSpec) -> Collate | None:
    """Return the function from samples to one batch.  Default: right-pad with zeros."""


# ---- training --------------------------------------------------------------


@hookspec(firstresult=True)
def specforge_draft(
    config: StrategyConfig,
    target: TargetInfo,
    manifest: CaptureManifest | None,
    token_counts: Tensor | None,
) -> Draft | None:
    """Build the draft model, seeded alike on every rank.  Required.

    `token_counts` [V] says how often each token is supervised in the training
    data.  It and `manifest` are None when weights are about to be loaded.
    """


@hookspec(firstresult=True)
def specforge_train_step(config: StrategyConfig) -> TrainStep | None:
    """Return the function that computes one micro-batch's loss.  Required."""


@hookspec
def specforge_step_finished(step: int, metrics: dict[str, float], output_dir: Path) -> None:
    """Receive the reduced metrics of a logged step.  Called on rank 0 only.

    The core's implementation appends to `output_dir`/metrics.jsonl.
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

    Called by `specforge doctor`, once per export that it measures.  A chain has
    `draft_tokens` tokens, unless the method drafts another number at once.  None when
    `target.engine` is not the name of this engine.
    """
