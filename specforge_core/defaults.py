"""What a strategy gets for free.  Every hook here is trylast, so a strategy's own wins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .capture.manifest import CaptureManifest
    from .config import TargetConfig
    from .types import (
        Batch,
        CaptureSpec,
        Collate,
        Problem,
        Reader,
        Sample,
        TargetCapture,
        TargetEngine,
        Transform,
    )


@hookimpl(trylast=True)
def specforge_target_engine(target: TargetConfig) -> TargetEngine | None:
    """Run the target in this process, when the config asks for `transformers`."""
    if target.engine != "transformers":
        return None
    from .capture.hf import TransformersEngine

    return TransformersEngine.load(target)


@hookimpl(trylast=True)
def specforge_verify_capture(
    spec: CaptureSpec, manifest: CaptureManifest, sample: Sample, fresh: TargetCapture | None
) -> list[Problem]:
    """Check names, shapes, dtypes, finiteness and token ids, whatever the strategy."""
    from .capture.verify import check_sample

    return check_sample(spec, manifest.identity, sample)


@hookimpl(trylast=True)
def specforge_reader(manifest: CaptureManifest, path: Path) -> Reader:
    """Read the safetensors shards that capture wrote."""
    from .capture.store import ShardReader

    return ShardReader(path, manifest)


@hookimpl(trylast=True)
def specforge_transform(spec: CaptureSpec, max_length: int) -> Transform:
    """Cut samples to `max_length` tokens."""
    return partial(truncate, spec=spec, max_length=max_length)


@hookimpl(trylast=True)
def specforge_collate() -> Collate:
    """Right-pad with zeros to the longest sample of the batch."""
    return pad


@hookimpl(trylast=True)
def specforge_step_finished(step: int, metrics: dict[str, float], output_dir: Path) -> None:
    """Append the metrics to metrics.jsonl."""
    from .train.metrics import append

    append(output_dir, step, metrics)


def truncate(sample: Sample, *, spec: CaptureSpec, max_length: int) -> Sample:
    """Keep the first `max_length` tokens of every field that has a token axis."""
    return {
        name: sample[name][:max_length] if field.shape[:1] == (None,) else sample[name]
        for name, field in spec.fields.items()
    }


def pad(samples: Sequence[Sample]) -> Batch:
    """Stack samples into [B, longest, ...]; zeros are the padding."""
    from torch.nn.utils.rnn import pad_sequence

    return {name: pad_sequence([s[name] for s in samples], batch_first=True) for name in samples[0]}
