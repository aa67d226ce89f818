"""Bring a draft to life: new, from a checkpoint or an export, and into an export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..capture.manifest import CaptureIdentity
from ..config import RunConfig
from ..data.ends import end_tokens
from ..errors import ConfigError
from ..load import apply_override, validate
from ..records import masked
from ..strategy import Strategy
from ..target.info import load_target_info
from ..target.tokenizer import load_tokenizer, template_options
from ..types import DataInfo, Draft, TargetInfo
from .checkpoint import TrainState, check_strategy, checkpoints, find, load_model, read_state
from .export import read_export, read_provenance, write_export
from .identity import Made, check_same, check_start, resolved, target_identity
from .verify import check_config


@dataclass(frozen=True, slots=True)
class Restored:
    """A draft with its weights, and the target it was made for."""

    draft: Draft
    target: TargetInfo


def restore(run: RunConfig, strategy: Strategy, path: Path, *, templates: bool = True) -> Restored:
    """Load the draft at `path`: a run's output, one checkpoint, or an exported directory.

    Raises CheckpointError when it was made otherwise than the run says, naming what differs
    (tokenizer and chat template only with `templates`), or its tensors are others.
    """
    target = load_target_info(run.target)
    stored = Stored.find(path)
    if stored.made is not None:
        check_strategy(stored.place, stored.made.strategy, strategy.name)
    draft = strategy.draft(run.strategy, target, None)
    if stored.made is not None:
        now = Made.of_run(run, strategy, draft, target_identity(run, strategy, target))
        check_same(stored.place, stored.made, now, type(run.strategy), templates=templates)
    stored.fill(run, strategy, target, draft)
    return Restored(draft, target)


@dataclass(frozen=True, slots=True)
class Stored:
    """A draft's weights on disk, and what they say of themselves."""

    place: Path
    made: Made | None  # an export of another tool does not say; its config.json is compared
    provenance: Mapping[str, Any] | None = None  # of an export; None: it is a checkpoint

    @classmethod
    def find(cls, path: Path) -> Stored:
        """Return the draft at `path`: a run's output, one checkpoint, or an export."""
        if not (path / "config.json").exists():
            checkpoint = find(path)
            return cls(checkpoint, Made.of_state(read_state(checkpoint)))
        provenance = read_provenance(path)
        return cls(path, Made.of_provenance(provenance, path), provenance)

    def fill(self, run: RunConfig, strategy: Strategy, target: TargetInfo, draft: Draft) -> None:
        """Load the weights into a draft."""
        if self.provenance is None:
            load_model(self.place, draft)
            return
        export = read_export(self.place, self.provenance)
        check_config(self.place, export.config, self.provenance)
        strategy.load_export(run.strategy, draft, target, export)


def first_draft(
    run: RunConfig,
    strategy: Strategy,
    target: TargetInfo,
    data: DataInfo,
    identity: CaptureIdentity,
    say: Callable[[str], None],
) -> Draft:
    """Build the draft that training begins with; a resumed run fills it from its checkpoint.

    What `train.init_from` was made with otherwise is said, a line each.  Raises CheckpointError
    where its weights would mean something else in this run, ConfigError when it names other
    weights than this run began with.
    """
    path, started = run.train.init_from, checkpoints(run.output_dir)
    if path is not None and started:
        before = read_state(started[-1]).config["train"].get("init_from")
        if before != str(path):
            raise ConfigError(
                f"train.init_from is {str(path)!r}, but the run in {run.output_dir} already began "
                f"from {repr(before) if before else 'new weights'} and would be resumed. "
                "Try: output_dir=ANOTHER"
            )
    if path is None or started:
        return strategy.draft(run.strategy, target, data)
    stored = Stored.find(path)
    draft = strategy.draft(run.strategy, target, None)
    if stored.made is not None:
        now = Made.of_run(run, strategy, draft, identity)
        for line in check_start(stored.place, stored.made, now, type(run.strategy)):
            say(line)
    stored.fill(run, strategy, target, draft)
    say(f"starting from the weights of {stored.place}")
    return draft


def export_checkpoint(
    path: Path,
    format: str,
    output: Path,
    *,
    force: bool,
    asked: tuple[RunConfig, Strategy] | None = None,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Write the draft of a checkpoint in `format`, with its provenance beside it.

    The config is `asked`, or what the checkpoint says with `overrides` such as
    "target.path=DIRECTORY".
    """
    checkpoint = find(path)
    state = read_state(checkpoint)
    run, strategy = asked or stored_run(checkpoint, state, overrides)
    restored = restore(run, strategy, checkpoint)
    target = _with_ends(run, restored.target)
    export = strategy.export(run.strategy, restored.draft, target, format)
    provenance: dict[str, Any] = {
        "strategy": state.strategy,
        "format": format,
        "target": run.target.path,
        "versions": state.versions,
        "step": state.step,
        "tokens": state.num_tokens,
        "config": masked({**state.config, "strategy": run.strategy.model_dump(mode="json")}),
        "resolved": resolved(restored.draft),
        "capture": state.identity.model_dump(mode="json"),
    }
    write_export(export, output, provenance=provenance, force=force)
    return output


def _with_ends(run: RunConfig, target: TargetInfo) -> TargetInfo:
    """Return a target whose config names every token that ends its answers, whoever knows it."""
    ends = sorted(end_tokens(target, load_tokenizer(run.target), template_options(run.data)))
    if not ends:
        return target
    named = ends if len(ends) > 1 else ends[0]
    return replace(target, config={**target.config, "eos_token_id": named})


def stored_run(
    checkpoint: Path, state: TrainState, overrides: tuple[str, ...] = ()
) -> tuple[RunConfig, Strategy]:
    """Return the config to read a checkpoint with: what it says of draft and target, no more.

    A checkpoint may be anybody's, so it decides about no code (`target.trust_remote_code`,
    engines, plugins), no secrets and no path but the target's; `overrides` may.
    """
    target, data = state.config["target"], state.config["data"]
    raw: dict[str, Any] = {
        "target": {
            "path": target.get("path"),
            "revision": target.get("revision") or state.identity.target_revision,
        },
        "strategy": copy.deepcopy(state.config["strategy"]),
        "data": {
            "chat_template_kwargs": copy.deepcopy(data.get("chat_template_kwargs") or {}),
            **({"now": data["now"]} if "now" in data else {}),
        },
    }
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, f"the config stored in {checkpoint}")
