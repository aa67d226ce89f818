"""`specforge train --plan`: what a run would do, and how long it would take."""

from __future__ import annotations

from ..capture.estimate import free_bytes, in_units
from ..capture.manifest import CaptureManifest
from ..config import RunConfig
from ..drafts.checkpoint import checkpoints
from ..errors import SpecForgeError
from ..process import describe
from ..records import recorded
from ..strategy import Strategy
from ..target.info import load_target_info
from ..yaml_text import dump
from .machine import choose


def plan_run(run: RunConfig, strategy: Strategy, nproc: int, *, measure: bool = False) -> str:
    """Return the plan as YAML: the resolved config under what follows from it.

    With `measure` a few steps are done, whose results are forgotten; without, no weight is loaded.
    Raises what the strategy says of a target that it cannot be trained for.
    """
    config = run.train
    resumed = checkpoints(run.output_dir)
    plan: dict[str, object] = {
        "strategy": strategy.package,
        "data": _data(run),
        **(
            {"samples_per_step": config.batch_size * config.accumulate * nproc}
            if config.batch_tokens is None
            else {"tokens_per_step": config.batch_tokens * config.accumulate * nproc}
        ),
        "processes": nproc,
        "resumes_from": str(resumed[-1]) if resumed else None,
    }
    try:
        target = load_target_info(run.target)
    except SpecForgeError as exc:
        plan["target"] = f"not available here: {exc}"
    else:
        spec = strategy.adapter(run.strategy, target).spec  # refuses what cannot be trained
        plan["target"] = {
            "hidden_size": target.hidden_size,
            "num_layers": target.num_layers,
            "vocab_size": target.vocab_size,
        }
        plan["machine"] = str(choose(run))
        plan["captures"] = {"layers": list(spec.layers), "final": spec.final}
        if measure:
            plan["measured"] = _measured(run, strategy, nproc)
    return dump({"plan": plan, "config": recorded(run)})


def _measured(run: RunConfig, strategy: Strategy, nproc: int) -> object:
    from .probe import probe

    try:
        found = probe(run, strategy, nproc).as_plan(run, nproc)
    except Exception as exc:  # too little memory, too: that is what a plan is for
        return f"nothing: {describe(exc)[0]}"
    found["free_in_output_dir"] = in_units(free_bytes(run.output_dir))
    return found


def _data(run: RunConfig) -> str:
    directory = run.data.capture_dir
    if directory is None:
        return f"online, from {len(run.data.train)} file(s) of conversations"
    try:
        manifest = CaptureManifest.read(directory)
    except SpecForgeError:
        return f"offline, from {directory}, which is not captured yet"
    size = f"{manifest.num_samples} samples, {manifest.num_tokens} tokens"
    return f"offline, from {directory}: {size}"
