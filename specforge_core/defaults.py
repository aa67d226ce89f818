"""What a strategy gets for free.  Every hook here is trylast, so a plugin's own wins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch.optim import Optimizer

    from .config import RunConfig, TargetConfig, TrainConfig
    from .types import (
        CaptureSpec,
        Collate,
        Draft,
        Problem,
        Reader,
        Sample,
        TargetEngine,
        TargetInfo,
        Tracker,
        Transform,
    )


@hookimpl(trylast=True)
def specforge_conversations(source: str) -> Iterable[Mapping[str, Any]]:
    """Read a file, a folder or a pattern of files, or a data set of Hugging Face."""
    from .data.files import open_source

    return open_source(source)  # type: ignore[return-value]  # a bad line is a DataError


@hookimpl(trylast=True)
def specforge_target_engine(target: TargetConfig, device: torch.device) -> TargetEngine | None:
    """Run the target in this process, when the config asks for `transformers`."""
    if target.engine != "transformers":
        return None
    from .target.engine import TransformersEngine

    return TransformersEngine.load(target, device)


@hookimpl(trylast=True)
def specforge_verify_capture(
    target: TargetInfo, spec: CaptureSpec, sample: Sample
) -> list[Problem]:
    """Check names, shapes, dtypes, finiteness and token ids, whatever the strategy."""
    from .capture.layout import check_sample

    return check_sample(spec, target.vocab_size, sample)


@hookimpl(trylast=True)
def specforge_reader(spec: CaptureSpec, path: Path) -> Reader:
    """Read the safetensors shards that capture wrote, and of them what the spec asks for."""
    from .capture.manifest import CaptureManifest
    from .capture.store import ShardReader

    return ShardReader(path, CaptureManifest.read(path), spec.fields)


@hookimpl(trylast=True)
def specforge_transform(spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length` tokens."""
    from .batches.collate import token_fields, truncate

    ragged = token_fields(spec)
    return lambda sample, generator: truncate(sample, ragged, max_length)


@hookimpl(trylast=True)
def specforge_collate(spec: CaptureSpec) -> Collate:
    """Put the samples behind each other in one row."""
    from .batches.collate import pack, token_fields

    return partial(pack, ragged=token_fields(spec))


@hookimpl(trylast=True)
def specforge_optimizers(train: TrainConfig, draft: Draft) -> list[Optimizer] | None:
    """Build `adamw`, or `muon` for the hidden layers' matrices with AdamW for the rest."""
    from .train.optim import build_optimizers

    return build_optimizers(draft, train) if train.optimizer in ("adamw", "muon") else None


@hookimpl(trylast=True)
def specforge_schedule(train: TrainConfig) -> Callable[[float], float] | None:
    """Return `constant`, `cosine` or `wsd`."""
    from .train.optim import SCHEDULES

    found = SCHEDULES.get(train.schedule)
    return None if found is None else partial(found, config=train)


@hookimpl(trylast=True)
def specforge_tracker(run: RunConfig) -> Tracker:
    """Append to `output_dir`/metrics.jsonl."""
    from .train.metrics import MetricsFile

    return MetricsFile(run.output_dir)
