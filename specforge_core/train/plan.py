"""`specforge train --plan`: what a run would do, and how long it would take."""

from __future__ import annotations

import torch

from ..capture.estimate import free_bytes
from ..capture.manifest import MANIFEST, CaptureManifest
from ..config import RunConfig
from ..drafts.checkpoint import checkpoints
from ..process import describe
from ..records import recorded
from ..strategy import Strategy
from ..target.info import load_target_info
from ..text import in_units
from ..yaml_text import dump
from .fsdp import check_shards
from .machine import choose


def plan_run(run: RunConfig, strategy: Strategy, nproc: int, *, measure: bool = False) -> str:
    """Return the plan as YAML: the resolved config under what follows from it.

    With `measure` a few steps are done, whose results are forgotten; without, no weight is loaded.
    Raises what `specforge train`, or a capture before it, would refuse the run with.
    """
    config = run.train
    check_shards(nproc, config.shard_size)
    resumed = checkpoints(run.output_dir)
    target = load_target_info(run.target)
    spec = strategy.adapter(run.strategy, target).spec  # refuses what cannot be trained
    captured = _captured(run)
    plan: dict[str, object] = {
        "strategy": strategy.package,
        "data": _data(run, captured),
        **(
            {"samples_per_step": config.batch_size * config.accumulate * nproc}
            if config.batch_tokens is None
            else {"tokens_per_step": config.batch_tokens * config.accumulate * nproc}
        ),
        "processes": nproc,
        "resumes_from": str(resumed[-1]) if resumed else None,
        "target": {
            "hidden_size": target.hidden_size,
            "num_layers": target.num_layers,
            "vocab_size": target.vocab_size,
        },
        "machine": str(choose(run)),
        "captures": {"layers": list(spec.layers), "final": spec.final},
    }
    if measure:
        ready = captured is not None and (captured.complete or run.data.follow)
        plan["measured"] = _measured(run if ready else _before_capture(run), strategy, nproc)
    return dump({"plan": plan, "config": recorded(run)})


def _captured(run: RunConfig) -> CaptureManifest | None:
    """Return what a run's capture says of itself; None where none was begun."""
    directory = run.data.capture_dir
    if directory is None or not (directory / MANIFEST).exists():
        return None
    return CaptureManifest.read(directory)


def _before_capture(run: RunConfig) -> RunConfig:
    """Return a run whose samples come from the target, as those of its capture will."""
    online = {"capture_dir": None, "follow": False}
    return run.model_copy(update={"data": run.data.model_copy(update=online)})


def _measured(run: RunConfig, strategy: Strategy, nproc: int) -> object:
    from .probe import probe

    try:
        found = probe(run, strategy, nproc).as_plan(run, nproc)
    except (MemoryError, torch.OutOfMemoryError) as exc:  # that is what a plan is for
        return f"nothing: {describe(exc)[0]}"
    found["free_in_output_dir"] = in_units(free_bytes(run.output_dir))
    return found


def _data(run: RunConfig, captured: CaptureManifest | None) -> str:
    directory = run.data.capture_dir
    if directory is None:
        return f"online, from {len(run.data.train)} file(s) of conversations"
    if captured is None:
        return f"offline, from {directory}, which is not captured yet"
    size = f"{captured.num_samples} samples, {captured.num_tokens} tokens"
    return f"offline, from {directory}: {size}{'' if captured.complete else ' so far'}"
