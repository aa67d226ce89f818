"""What a draft was made of: recorded with its weights, compared wherever they are read back.

A draft that is read with other options than it was trained with loads without an error and is
accepted less, or nowhere.  So everything counts that is not marked as free to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..capture.identity import capture_identity
from ..capture.manifest import CaptureIdentity
from ..config import MayChange, RunConfig, StrategyConfig
from ..documents import why_invalid
from ..errors import CheckpointError
from ..strategy import Strategy
from ..target.tokenizer import load_tokenizer
from ..types import Draft, TargetInfo
from .state import TrainState

TEMPLATES = ("tokenizer_fingerprint", "chat_template_fingerprint")
# field of a CaptureIdentity -> how it is called, and what can be done about it
TARGET = {
    "target_fingerprint": (
        "the target's weights or config",
        "target.path and target.revision of the target it was trained for",
    ),
    "tokenizer_fingerprint": ("the tokenizer", "the tokenizer it was trained with"),
    "chat_template_fingerprint": (
        "the chat template or data.chat_template_kwargs",
        "the chat template, data.chat_template_kwargs and data.now it was trained with",
    ),
    "layers": ("the captured layers", "the strategy's layers it was trained with"),
    "final": ("the final hidden state", "the strategy section it was trained with"),
}
LOOSE = ("target_fingerprint", *TEMPLATES)  # said, not refused, where another run only starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a draft was made of, or would be made of by a run."""

    strategy: str
    options: Mapping[str, Any]  # the strategy section, as JSON has it
    resolved: Mapping[str, Any]  # `Draft.resolved`, as JSON has it
    identity: CaptureIdentity

    @classmethod
    def of_run(
        cls, run: RunConfig, strategy: Strategy, draft: Draft, identity: CaptureIdentity
    ) -> Made:
        """Return what this run makes drafts of."""
        return cls(
            strategy=strategy.name,
            options=run.strategy.model_dump(mode="json"),
            resolved=resolved(draft),
            identity=identity,
        )

    @classmethod
    def of_state(cls, state: TrainState) -> Made:
        """Return what a checkpoint says."""
        return cls(
            strategy=state.strategy,
            options=state.config["strategy"],
            resolved=state.resolved,
            identity=state.identity,
        )

    @classmethod
    def of_provenance(cls, found: Mapping[str, Any], where: Path) -> Made | None:
        """Return what an export says; None for one that does not say what it was made of."""
        if "capture" not in found or "config" not in found:
            return None
        try:
            options = found["config"]["strategy"]
            return cls(
                strategy=str(found["strategy"]),
                options={str(key): value for key, value in options.items()},
                resolved=dict(found.get("resolved") or {}),
                identity=CaptureIdentity.model_validate_json(json.dumps(found["capture"])),
            )
        except (ValidationError, KeyError, TypeError, AttributeError, ValueError) as exc:
            why = why_invalid(exc) if isinstance(exc, ValidationError) else repr(exc)
            raise CheckpointError(f"{where} is damaged: {why}. Export again") from exc


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that a draft was made with, and a run has otherwise."""

    name: str
    theirs: str
    ours: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.theirs} in it, {self.ours} in this run"


def resolved(draft: Draft) -> dict[str, Any]:
    """Return `Draft.resolved` as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(dict(draft.resolved), default=str))
    return found


def target_identity(run: RunConfig, strategy: Strategy, target: TargetInfo) -> CaptureIdentity:
    """Return the identity of what a run's draft reads; reads a little of the target's weights."""
    spec = strategy.adapter(run.strategy, target).spec
    return capture_identity(run, strategy, target, spec, load_tokenizer(run.target))


def check_same(
    where: Path,
    made: Made,
    now: Made,
    model: type[StrategyConfig],
    *,
    templates: bool = True,
    otherwise: str | None = None,
) -> None:
    """Raise CheckpointError unless a run has everything as the draft at `where` was made with.

    Names each field with both values.  `templates`: compare tokenizer and chat template, too;
    `otherwise`: what else can be done where a run may start with what differs.
    """
    found = differences(where, made, now, model)
    found = [d for d in found if templates or d.name not in _names(TEMPLATES)]
    anew = all(_may_start(model, d.name) for d in found)
    _refuse(where, found, otherwise if anew else None)


def check_start(where: Path, made: Made, now: Made, model: type[StrategyConfig]) -> list[str]:
    """Raise CheckpointError where weights would mean something else in the run that starts.

    Returns what else differs, a line each: another target, another objective.
    """
    found = differences(where, made, now, model, start=True)
    said = [d for d in found if _may_start(model, d.name)]
    _refuse(where, [d for d in found if d not in said])
    return [f"the weights of {where} were made otherwise: {d}" for d in said]


def differences(
    where: Path, made: Made, now: Made, model: type[StrategyConfig], *, start: bool = False
) -> list[Difference]:
    """Return what differs, the options first; of another strategy's those that both have.

    A run that only starts from the weights need not know each option they were trained with.
    """
    options = made.options if start else _as_today(where, made, model)
    found = sorted(_options(options, now.options, model), key=lambda d: d.name)
    for key in sorted(made.resolved.keys() & now.resolved.keys()):
        theirs, ours = made.resolved[key], now.resolved[key]
        name = f"strategy.{key}" if key in model.model_fields else key
        if theirs != ours and name not in [d.name for d in found]:
            known = name != key and not isinstance(theirs, Mapping)
            remedy = f"{name}={_value(theirs)}" if known else "the target it was trained for"
            found.append(Difference(name, _value(theirs), _value(ours), remedy))
    for field, (name, remedy) in TARGET.items():
        known = field == "layers" and "strategy.layers" in [d.name for d in found]
        if start and field == "final":  # who reads none does not mind which one another reads
            known = "none" in (made.identity.final, now.identity.final)
        if not known and getattr(made.identity, field) != getattr(now.identity, field):
            ids = made.identity, now.identity
            theirs, ours = ids[0].shown(field, ids[1]), ids[1].shown(field, ids[0])
            found.append(Difference(name, theirs, ours, remedy))
    return found


def _options(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], model: type[StrategyConfig]
) -> Iterator[Difference]:
    """Yield the options that differ and count."""
    for name in ours.keys() & theirs.keys() - {"name"}:
        if theirs[name] != ours[name] and MayChange.ALWAYS not in model.model_fields[name].metadata:
            key, value = f"strategy.{name}", _value(theirs[name])
            yield Difference(key, value, _value(ours[name]), f"{key}={value}")


def _as_today(where: Path, made: Made, model: type[StrategyConfig]) -> dict[str, Any]:
    """Return stored options as the installed package has them, new ones at their defaults."""
    try:
        return model.model_validate(made.options).model_dump(mode="json")
    except ValidationError as exc:
        raise CheckpointError(
            f"{where} was trained with options that the installed package of strategy "
            f"{made.strategy!r} does not have: {why_invalid(exc)}. Install the version it was "
            "trained with"
        ) from exc


def _may_start(model: type[StrategyConfig], name: str) -> bool:
    field = model.model_fields.get(name.removeprefix("strategy."))
    return name in _names(LOOSE) or (field is not None and MayChange.AT_START in field.metadata)


def _names(fields: tuple[str, ...]) -> list[str]:
    return [TARGET[field][0] for field in fields]


def _refuse(where: Path, found: list[Difference], otherwise: str | None = None) -> None:
    if not found:
        return
    lines = "".join(f"\n  {item}" for item in found)
    remedies = " ".join(dict.fromkeys(d.remedy for d in found if "=" in d.remedy))
    others = ", and ".join(dict.fromkeys(d.remedy for d in found if "=" not in d.remedy))
    tries = ", with ".join(part for part in (remedies, others) if part)
    ending = f", or {otherwise}" if otherwise else ""
    raise CheckpointError(
        f"{where} was made with other settings than this run:{lines}\nTry: {tries}{ending}"
    )


def _value(value: Any) -> str:
    """Return a value as an override takes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
